"""Break down the bytes of a near commit, and compare its codes with their entropy.

python -m scripts.bench.byte_count RUN --first 1050 --last 1150 [--codec near]

The script commits a stretch of a run and reads the frames of the last commit. *Codes* select the
level of each value; *side information* is everything else (levels, factors, JSON objects).
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from ckptvcs.codec import frame
from ckptvcs.codec.codes import get_codes
from ckptvcs.codec.frame import slice_size
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from scripts.bench.tables import stretch

LEAST = 1 << 16  # slices with fewer codes are not compared with their entropy


def codes_at(data: bytes) -> int | None:
    """Return the offset of the codes in a slice (methods 4, 6, 7); None for other methods."""
    if data[0] == frame.NEAR_WEIGHT:
        _, _, levels, columns, _ = struct.unpack_from("<hfBII", data, 1)
        at = 1 + 15 + 2 * levels
        if columns:
            at += 4 + int.from_bytes(data[at + 1 : at + 4], "little")
        return int(at)
    if data[0] in (frame.NEAR_FIRST, frame.NEAR_SCALED_FIRST):
        return 1 + 5 + 4 * int(data[5])
    return None


def excess(data: bytes, at: int, count: int) -> float:
    """Return (bytes of the codes) / (their order-0 entropy) - 1."""
    codes, _ = get_codes(memoryview(data), at, count)
    _, counts = np.unique(codes.dense(count), return_counts=True)
    share = counts / count
    entropy = float(-(share * np.log2(share)).sum()) * count
    return 8 * (len(data) - at) / entropy - 1 if entropy else 0.0


def count_bytes(repo: Repo, name: ObjectId) -> tuple[Counter[str], list[float]]:
    """Return the bytes of a commit by purpose, and the `excess` of its large slices."""
    store, commit = handle(repo).catalog.store, handle(repo).catalog.commit(name)
    schema = handle(repo).catalog.schema(commit.schema)
    sizes: Counter[str] = Counter()
    excesses = []
    for part, state in commit.parts.items():
        stored = schema.stored(part)
        for position, number in enumerate(stored):
            bundle, row = handle(repo).catalog.frame(state.values, position)
            for index, (offset, length, _) in enumerate(row.slices):
                count = slice_size(schema.tensors[number].words, index)
                data = bytes(store.read_region(bundle, offset, length))
                at = codes_at(data)
                if at is not None:
                    sizes["codes"] += length - at
                    sizes["side: levels and rows"] += at
                    if count >= LEAST:
                        excesses.append(excess(data, at, count))
                elif data[0] in (frame.NEAR_LOW_RANK, frame.NEAR_SCALED_LOW_RANK):
                    sizes["codes (components)"] += length
                elif data[0] == frame.NEAR_SECOND:
                    sizes["side: second moments"] += length
                else:
                    sizes["exact"] += length
    frames = sum(sizes.values())
    stored_bytes = repo.entry(name).stored_bytes
    sizes["side: recipes and the commit"] = stored_bytes - frames
    return sizes, excesses


def main() -> None:
    """Print the breakdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=1 << 60)
    parser.add_argument("--codec", default="near")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckpt-bytes-") as scratch:
        repo = Repo.init(scratch)
        for path in stretch(options.run, options.first, options.last):
            result = repo.commit_path(path, message=path.stem, codec=options.codec)
        sizes, excesses = count_bytes(repo, result.id)
    total = sum(sizes.values())
    for what, size in sizes.most_common():
        sys.stdout.write(f"{what:<28} {size:>12,} {size / total:7.1%}\n")
    side = sum(size for what, size in sizes.items() if what.startswith("side"))
    sys.stdout.write(f"{'all side information':<28} {side:>12,} {side / total:7.1%}\n")
    if excesses:
        sys.stdout.write(
            f"excess of codes over their entropy: median {np.median(excesses):.2%}, "
            f"maximum {max(excesses):.2%}, {len(excesses)} slices of {LEAST:,} or more codes\n"
        )


if __name__ == "__main__":
    main()
