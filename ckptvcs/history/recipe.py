"""How tensors are stored: hash tables, recipes and bundles.

    values   the hashes of a part's tensors, in schema order: 32 bytes each
    recipe   the position of each tensor's frame, for one tensor hash table
    bundle   frames written together, with the hash of every slice; refers to bases by values

Layout: docs/format.md, "Values", "Recipe", "Bundle".
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
MAX_SHARE = (1 << 24) - 1
"""The largest denominator of a share: its product with a float32 is exact in float64."""
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


FramePlace = tuple[ObjectId, int]
"""The bundle of a frame, and its number there."""


@dataclass(frozen=True)
class Between:
    """A tensor that is interpolated: `first` + (`last` - `first`) * `part` / `whole`.

    `first` and `last` are tensors: hash table and position.
    """

    first: tuple[ObjectId, int]
    last: tuple[ObjectId, int]
    part: int
    whole: int


@dataclass(frozen=True)
class Recipe:
    """The frames of a tensor hash table: tensor i is frame `frames[i]` of `bundles[owners[i]]`.

    Of the recipes whose bundles all exist, the one with the highest `generation` is used.
    The recipe of an exact `patch` shares a pack with its table and bundle and is deleted with it:
    nothing else may depend on its values.

    A tensor whose owner is the number of bundles has no frame.  It is interpolated between the
    tensors `frames[i]` of the two tables `ends`, at `share` (numerator, denominator) of the way.
    Those have frames, and no frame is based on an interpolated tensor.
    """

    values: ObjectId
    generation: int
    bundles: tuple[ObjectId, ...]
    owners: tuple[int, ...]
    frames: tuple[int, ...]
    patch: bool = False
    ends: tuple[ObjectId, ...] = ()
    share: tuple[int, ...] = ()

    def place(self, tensor: int) -> Between | FramePlace:
        """Return the bundle and frame number of a tensor, or the two that it is between."""
        owner, number = self.owners[tensor], self.frames[tensor]
        if owner < len(self.bundles):
            return self.bundles[owner], number
        (first, last), (part, whole) = self.ends, self.share
        return Between((first, number), (last, number), part, whole)

    def frame_place(self, tensor: int) -> FramePlace:
        """Return the bundle and frame number of a tensor.

        Raises:
            CorruptionError: it is interpolated.
        """
        place = self.place(tensor)
        if isinstance(place, Between):
            raise CorruptionError(f"tensor {tensor} of the table {self.values[:8]} has no frame")
        return place

    def frame_places(self) -> set[FramePlace]:
        """Return the bundle and number of every frame that the recipe names."""
        used = zip(self.owners, self.frames, strict=True)
        return {(self.bundles[owner], n) for owner, n in used if owner < len(self.bundles)}


_RECIPE = Fields(Recipe)
dump_recipe = _RECIPE.dump


def load_recipe(data: bytes) -> Recipe:
    """Parse a recipe.  Raises CorruptionError."""
    recipe = _RECIPE.load(data, "a recipe")
    listed = range(len(recipe.bundles) + bool(recipe.ends))
    if recipe.ends or recipe.share:
        share = [0, *recipe.share, MAX_SHARE + 1]
        if len(recipe.ends) != 2 or len(share) != 4 or share != sorted(set(share)) or recipe.patch:
            raise CorruptionError("a recipe names no valid place between two tables")
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
