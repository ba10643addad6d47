"""How tensors are stored: hash tables, recipes, bundles, and drop records.

    values   the hashes of a part's tensors, in schema order: 32 bytes each
    recipe   the position of each tensor's frame, for one tensor hash table
    bundle   frames written together, with the hash of every slice; refers to bases by values
    record   a fade or a drop by a rule, written before anything is deleted

Layout: docs/format.md, "Values", "Recipe", "Bundle", "Records".
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hasher
from ckptvcs.history.canonical_json import Json
from ckptvcs.history.fields import TEXT, Fields, FieldType, many, optional
from ckptvcs.store.ids import ObjectId

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


_RECIPE = Fields(Recipe)
dump_recipe = _RECIPE.dump


def load_recipe(data: bytes) -> Recipe:
    """Parse a recipe.  Raises CorruptionError."""
    recipe = _RECIPE.load(data, "a recipe")
    listed = range(len(recipe.bundles))
    if len(recipe.owners) != len(recipe.frames) or any(o not in listed for o in recipe.owners):
        raise CorruptionError("a recipe names a bundle that it does not list")
    return recipe


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


@dataclass
class _Row:
    """A frame as a bundle stores it: `base` is (position in the bases, position in that table)."""

    lengths: tuple[int, ...]
    hashes: str
    base: tuple[int, ...] | None = None
    depth: int = 0
    companion: int | None = None
    starts: tuple[int, ...] = ()
    dtype: str | None = None


@dataclass
class _Bundle:
    """The table of contents of a bundle; `dtype` is that of most frames."""

    bases: tuple[ObjectId, ...]
    frames: tuple[_Row, ...]
    dtype: str | None = None
    exact: ObjectId | None = None


def _load_dtype(value: Json) -> str:
    dtype: str = TEXT.load(value)
    if dtype not in DTYPES:
        raise CorruptionError(f"a frame has an unknown element type '{dtype}'")
    return dtype


_DTYPE = optional(FieldType(_load_dtype))
_ROW = Fields(_Row, dtype=_DTYPE)
_BUNDLE = Fields(_Bundle, frames=many(_ROW.type), dtype=_DTYPE)


def dump_bundle(frames: list[Frame], exact: ObjectId | None = None) -> bytes:
    """Return the canonical bytes of a bundle: its table of contents.

    `exact` is the table of an exact patch, whose slices have no hashes to tell bundles apart.
    """
    bases: dict[ObjectId, int] = {}
    rows = []
    end = 0  # of the slices so far
    types = Counter(frame.dtype for frame in frames)
    common = None if None in types else max(types, key=lambda name: types[name], default=None)
    for frame in frames:
        starts, lengths, hashes = zip(*frame.slices, strict=True) if frame.slices else ((), (), ())
        base: tuple[int, ...] | None = None
        if frame.base is not None:
            base = bases.setdefault(frame.base[0], len(bases)), frame.base[1]
        row = _Row(
            lengths,
            b"".join(hashes).hex(),
            base,
            frame.depth if base else 0,
            frame.companion,
            () if starts == _consecutive(lengths, end) else starts,
            None if frame.dtype == common else frame.dtype,
        )
        rows.append(row)
        end = starts[-1] + lengths[-1] if lengths else end
    return _BUNDLE.dump(_Bundle(tuple(bases), tuple(rows), common, exact))


def load_bundle(data: bytes) -> tuple[Frame, ...]:
    """Parse a bundle.  Raises CorruptionError."""
    bundle = _BUNDLE.load(data, "a bundle")
    frames: list[Frame] = []
    end = 0  # of the slices so far
    for row in bundle.frames:
        hashes = _hashes_of(row)
        starts = row.starts or _consecutive(row.lengths, end)
        if len(starts) != len(row.lengths):
            raise CorruptionError("a bundle does not have a start for each slice")
        if starts:
            end = starts[-1] + row.lengths[-1]
        if row.companion is not None and row.companion >= len(frames):
            raise CorruptionError("a frame references an auxiliary frame that is not before it")
        base = _base_of(row, bundle.bases)
        slices = tuple(zip(starts, row.lengths, hashes, strict=True))
        depth = row.depth if base else 0
        frames.append(Frame(base, depth, row.companion, slices, row.dtype or bundle.dtype))
    return tuple(frames)


def _hashes_of(row: _Row) -> list[bytes]:
    """Return the hashes of the slices of a frame."""
    try:
        data = bytes.fromhex(row.hashes)
    except ValueError:
        data = b""
    if len(data) != SLICE_HASH_BYTES * len(row.lengths):
        raise CorruptionError("a bundle does not have a hash for each slice")
    return [data[at : at + SLICE_HASH_BYTES] for at in range(0, len(data), SLICE_HASH_BYTES)]


def _base_of(row: _Row, bases: tuple[ObjectId, ...]) -> tuple[ObjectId, int] | None:
    """Return the base of a frame, whose table is one of `bases`."""
    if row.base is None:
        return None
    if len(row.base) != 2 or row.base[0] >= len(bases) or row.depth < 1:
        raise CorruptionError("a bundle names a base that it does not list")
    return bases[row.base[0]], row.base[1]


def _consecutive(lengths: tuple[int, ...], start: int) -> tuple[int, ...]:
    """Return the offsets of slices that follow one another."""
    return tuple(accumulate(lengths, initial=start))[: len(lengths)]


LEFT_OUT = "bundle"
"""The rule of the records that say what a bundle file left out; no undo brings that back."""


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


def _load_version(value: Json) -> tuple[str, int]:
    if type(value) is not list or [type(item) for item in value] != [str, int]:
        raise ValueError
    return value[0], value[1]


_DROP_RECORD = Fields(DropRecord, after=many(FieldType(_load_version)))
dump_drop_record = _DROP_RECORD.dump


def load_drop_record(data: bytes) -> DropRecord:
    """Parse a record.  Raises CorruptionError."""
    record = _DROP_RECORD.load(data, "a record")
    if record.what not in ("fade", "drop", "undo"):
        raise CorruptionError("a drop record has an unknown type")
    return record
