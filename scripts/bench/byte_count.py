"""Where the bytes of a near commit go, and how far its codes are from their entropy.

python -m scripts.bench.byte_count RUN --first 1050 --last 1150 [--codec near]

Commits a stretch of a run and takes the last commit apart: *codes* are what says which level each
value has; *side information* is everything else (levels, factors, tables of contents, the commit).
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
from ckptvcs.codec.frame import slice_counts
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from scripts.bench.tables import stretch

LEAST = 1 << 16  # codes of a slice whose entropy is looked at


def codes_at(data: bytes) -> int | None:
    """Where the codes of a weight, or of a first moment entry by entry, begin."""
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
    """Code bytes against their order-0 entropy, less one."""
    codes, _ = get_codes(memoryview(data), at, count)
    _, counts = np.unique(codes.dense(count), return_counts=True)
    share = counts / count
    entropy = float(-(share * np.log2(share)).sum()) * count
    return 8 * (len(data) - at) / entropy - 1 if entropy else 0.0


def count_bytes(repo: Repo, name: ObjectId) -> tuple[Counter[str], list[float]]:
    """Bytes of a commit by what they are for; the excess of each slice of many codes."""
    store, commit = repo.repository.catalog.store, repo.repository.catalog.commit(name)
    schema = repo.repository.catalog.schema(commit.schema)
    found: Counter[str] = Counter()
    excesses = []
    for part, state in commit.parts.items():
        stored = schema.stored(part)
        for position, number in enumerate(stored):
            bundle, row = repo.repository.catalog.frame(state.values, position)
            counts = slice_counts(schema.tensors[number].words)
            for (offset, length, _), count in zip(row.slices, counts, strict=True):
                data = bytes(store.read_region(bundle, offset, length))
                at = codes_at(data)
                if at is not None:
                    found["codes"] += length - at
                    found["side: levels and rows"] += at
                    if count >= LEAST:
                        excesses.append(excess(data, at, count))
                elif data[0] in (frame.NEAR_LOW_RANK, frame.NEAR_SCALED_LOW_RANK):
                    found["codes (directions)"] += length
                elif data[0] == frame.NEAR_SECOND:
                    found["side: second moments"] += length
                else:
                    found["exact"] += length
    frames = sum(found.values())
    stored_bytes = repo.entry(name).stored_bytes
    found["side: tables and the commit"] = stored_bytes - frames
    return found, excesses


def main() -> None:
    """Take a commit apart."""
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
            made = repo.commit_path(path, message=path.stem, codec=options.codec)
        found, excesses = count_bytes(repo, made.id)
    total = sum(found.values())
    for what, size in found.most_common():
        sys.stdout.write(f"{what:<28} {size:>12,} {size / total:7.1%}\n")
    side = sum(size for what, size in found.items() if what.startswith("side"))
    sys.stdout.write(f"{'side information together':<28} {side:>12,} {side / total:7.1%}\n")
    if excesses:
        sys.stdout.write(
            f"codes over their entropy: median {np.median(excesses):.2%}, "
            f"most {max(excesses):.2%}, of {len(excesses)} slices of {LEAST:,} or more\n"
        )


if __name__ == "__main__":
    main()
