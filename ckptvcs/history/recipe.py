"""How tensors are stored: hash tables, recipes, bundles, and drop records.

    values   the hashes of a part's tensors, in schema order: 32 bytes each
    recipe   the position of each tensor's frame, for one tensor hash table
    bundle   frames written together, with the hash of every slice; refers to bases by values
    record   a fade or a drop by a rule, written before anything is deleted

Layout: docs/format.md, "Values", "Recipe", "Bundle", "Records".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hasher
from ckptvcs.history.canonical_json import Record, dump, load
from ckptvcs.store.ids import ObjectId, checked_id

VALUE_BYTES = 32
SLICE_HASH_BYTES = 16


def dump_values(hashes: list[bytes]) -> bytes:
    """Return the bytes of a tensor hash table."""
    return b"".join(hashes)


def load_values(data: bytes) -> list[bytes]:
    """Parse a tensor hash table.  Raises CorruptionError."""
    if len(data) % VALUE_BYTES:
        raise CorruptionError("a tensor hash table has an invalid length")
    return [data[at : at + VALUE_BYTES] for at in range(0, len(data), VALUE_BYTES)]


NO_HASH = bytes(SLICE_HASH_BYTES)
"""Replaces the hash of a slice of an exact patch: the hash of its tensor proves it."""


def slice_hash(*data: bytes | memoryview) -> bytes:
    """Return the hash of a slice, which may be given in pieces."""
    digest = hasher()
    for piece in data:
        digest.update(piece)
    return digest.digest(SLICE_HASH_BYTES)


@dataclass(frozen=True)
class Recipe:
    """The frames of a tensor hash table: tensor i is frame `frames[i]` of `bundles[owners[i]]`.

    Of the recipes whose bundles all exist, the one with the highest `generation` is used.
    The recipe of an exact `patch` shares a pack with its table and bundle and is deleted with it:
    nothing else may depend on its values.
    """

    values: ObjectId
    generation: int
    bundles: tuple[ObjectId, ...]
    owners: tuple[int, ...]
    frames: tuple[int, ...]
    patch: bool = False

    def place(self, tensor: int) -> tuple[ObjectId, int]:
        """Return the bundle and frame number of a tensor."""
        return self.bundles[self.owners[tensor]], self.frames[tensor]


def dump_recipe(recipe: Recipe) -> bytes:
    """Return the canonical bytes of a recipe."""
    return dump(
        {
            "values": recipe.values,
            "generation": recipe.generation,
            "bundles": list(recipe.bundles),
            "owners": list(recipe.owners),
            "frames": list(recipe.frames),
            **({"patch": True} if recipe.patch else {}),
        }
    )


def load_recipe(data: bytes) -> Recipe:
    """Parse a recipe.  Raises CorruptionError."""
    record = load(data, "a recipe")
    bundles = tuple(checked_id(name) for name in record.texts("bundles"))
    owners, frames = record.integers("owners"), record.integers("frames")
    if len(owners) != len(frames) or any(owner >= len(bundles) for owner in owners):
        raise CorruptionError("a recipe names a bundle that it does not list")
    return Recipe(
        checked_id(record.text("values")),
        record.integer("generation"),
        bundles,
        tuple(owners),
        tuple(frames),
        record.flag("patch"),
    )


@dataclass(frozen=True)
class Frame:
    """One encoded tensor in a bundle.

    `base` is (hash table, position there) of the tensor it depends on; `depth` is the number of
    frames below it; `companion` is the auxiliary frame of this bundle that it needs; `slices` are
    (offset in the region of the bundle, length in bytes, hash).  `dtype` is the encoded element
    type, None in bundles of older programs: tensors of several types may share a frame.
    """

    base: tuple[ObjectId, int] | None
    depth: int
    companion: int | None
    slices: tuple[tuple[int, int, bytes], ...]
    dtype: str | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all slices."""
        return sum(length for _, length, _ in self.slices)


def dump_bundle(frames: list[Frame], exact: ObjectId | None = None) -> bytes:
    """Return the canonical bytes of a bundle: its table of contents.

    `exact` is the table of an exact patch, whose slices have no hashes to tell bundles apart.
    """
    bases: dict[ObjectId, int] = {}
    rows = []
    at = 0
    types = Counter(frame.dtype for frame in frames)
    common = None if None in types else max(types, key=lambda name: types[name], default=None)
    for frame in frames:
        row: dict[str, object] = {
            "lengths": [length for _, length, _ in frame.slices],
            "hashes": "".join(digest.hex() for _, _, digest in frame.slices),
        }
        starts = [start for start, _, _ in frame.slices]
        for start, length, _ in frame.slices:
            if start != at:
                row["starts"] = starts
            at = start + length
        if frame.base is not None:
            table = bases.setdefault(frame.base[0], len(bases))
            row |= {"base": [table, frame.base[1]], "depth": frame.depth}
        if frame.companion is not None:
            row["companion"] = frame.companion
        if frame.dtype != common:
            row["dtype"] = frame.dtype
        rows.append(row)
    return dump(
        {
            "bases": list(bases),
            "frames": rows,
            **({"exact": exact} if exact else {}),
            **({"dtype": common} if common else {}),
        }
    )


def load_bundle(data: bytes) -> tuple[Frame, ...]:
    """Parse a bundle.  Raises CorruptionError."""
    record = load(data, "a bundle")
    bases = [checked_id(name) for name in record.texts("bases")]
    common = _dtype(record)
    frames: list[Frame] = []
    end = 0  # of the slices so far
    for row in record.records("frames"):
        lengths = row.integers("lengths")
        hashes = _load_hashes(row, len(lengths))
        base = _load_base(row, bases)
        starts = _load_starts(row, lengths, end)
        if lengths:
            end = starts[-1] + lengths[-1]
        companion = row.optional_integer("companion")
        if companion is not None and companion >= len(frames):
            raise CorruptionError("a frame references an auxiliary frame that is not before it")
        depth = row.integer("depth") if base else 0
        dtype = _dtype(row) if row.has("dtype") else common
        slices = tuple(zip(starts, lengths, hashes, strict=True))
        frames.append(Frame(base, depth, companion, slices, dtype))
    return tuple(frames)


def _load_hashes(row: Record, count: int) -> list[bytes]:
    """Return the hashes of the slices of a frame."""
    try:
        data = bytes.fromhex(row.text("hashes"))
    except ValueError:
        data = b""
    if len(data) != SLICE_HASH_BYTES * count:
        raise CorruptionError("a bundle does not have a hash for each slice")
    return [data[at : at + SLICE_HASH_BYTES] for at in range(0, len(data), SLICE_HASH_BYTES)]


def _load_base(row: Record, bases: Sequence[ObjectId]) -> tuple[ObjectId, int] | None:
    """Return the base of a frame, whose table is one of `bases`."""
    if not row.has("base"):
        return None
    pair = row.integers("base")
    if len(pair) != 2 or pair[0] >= len(bases) or row.integer("depth") < 1:
        raise CorruptionError("a bundle names a base that it does not list")
    return bases[pair[0]], pair[1]


def _load_starts(row: Record, lengths: list[int], end: int) -> list[int]:
    """Return the offsets of the slices of a frame, by default consecutive from `end` on."""
    starts = row.integers("starts") if row.has("starts") else []
    if starts and len(starts) != len(lengths):
        raise CorruptionError("a bundle does not have a start for each slice")
    return starts or list(accumulate(lengths, initial=end))[: len(lengths)]


def _dtype(record: Record) -> str | None:
    dtype = record.optional_text("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise CorruptionError(f"a frame has an unknown element type '{dtype}'")
    return dtype


@dataclass(frozen=True)
class DropRecord:
    """A fade, a drop or an undo of such records.

    A fade names parts that lose their exact patch, a drop the dropped parts, or whole commits if it
    names none.  `undoes` are record ids.  `after` holds the version of each branch, because clocks
    can be wrong.  Records are durable before anything is deleted: a patch or bundle that is missing
    without a record is damage.
    """

    what: str
    commits: tuple[ObjectId, ...]
    parts: tuple[str, ...]
    rule: str
    time: str
    undoes: tuple[ObjectId, ...] = ()
    after: tuple[tuple[str, int], ...] = ()


def dump_drop_record(record: DropRecord) -> bytes:
    """Return the canonical bytes of a record."""
    return dump(
        {
            "what": record.what,
            "commits": list(record.commits),
            "parts": list(record.parts),
            "rule": record.rule,
            "time": record.time,
            **({"undoes": list(record.undoes)} if record.undoes else {}),
            **({"after": [[*pair] for pair in record.after]} if record.after else {}),
        }
    )


def load_drop_record(data: bytes) -> DropRecord:
    """Parse a record.  Raises CorruptionError."""
    record = load(data, "a record")
    if record.text("what") not in ("fade", "drop", "undo"):
        raise CorruptionError("a drop record has an unknown type")
    return DropRecord(
        record.text("what"),
        tuple(checked_id(name) for name in record.texts("commits")),
        tuple(record.texts("parts")),
        record.text("rule"),
        record.text("time"),
        tuple(map(checked_id, record.texts("undoes") if record.has("undoes") else ())),
        record.pairs("after") if record.has("after") else (),
    )
