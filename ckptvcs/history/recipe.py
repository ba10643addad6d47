"""How values are stored: tables of values, recipes, bundles, and records of what was let go.

    values   the hashes of a part's tensors, in schema order: 32 bytes each
    recipe   for one table of values, where the frame of each tensor lies
    bundle   frames written together, with the hash of every slice; names bases by values
    record   a fade or a drop: what a rule let go, written before anything is deleted

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
    """The content of a table of values."""
    return b"".join(hashes)


def load_values(data: bytes) -> list[bytes]:
    """The hashes of a table of values.  Raises CorruptionError."""
    if len(data) % VALUE_BYTES:
        raise CorruptionError("a table of values has a broken length")
    return [data[at : at + VALUE_BYTES] for at in range(0, len(data), VALUE_BYTES)]


NO_HASH = bytes(SLICE_HASH_BYTES)
"""In the place of the hash of a slice of an exact patch: its tensor's own proves it."""


def slice_hash(*data: bytes | memoryview) -> bytes:
    """The hash that a bundle holds for each slice, which may be given in pieces."""
    digest = hasher()
    for piece in data:
        digest.update(piece)
    return digest.digest(SLICE_HASH_BYTES)


@dataclass(frozen=True)
class Recipe:
    """Where the frames of a table of values lie: tensor i is frame `frames[i]` of bundle
    `bundles[owners[i]]`.  The highest `generation` whose bundles are all there is used.

    That of an exact `patch` lies in one pack with its table and bundle, and goes with it: nothing
    else may stand on what it decodes to.
    """

    values: ObjectId
    generation: int
    bundles: tuple[ObjectId, ...]
    owners: tuple[int, ...]
    frames: tuple[int, ...]
    patch: bool = False

    def place(self, tensor: int) -> tuple[ObjectId, int]:
        """Bundle and frame of a tensor."""
        return self.bundles[self.owners[tensor]], self.frames[tensor]


def dump_recipe(recipe: Recipe) -> bytes:
    """The canonical bytes of a recipe."""
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
    """Read a recipe.  Raises CorruptionError."""
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

    `base` is (table of values, position there) of the tensor it stands on; `depth` counts the
    frames below it; `companion` is the frame of this bundle that it needs beside it; `slices` are
    (offset in the bundle's region, length, hash).  `dtype` is the element type that it was encoded
    as, None in bundles of older programs: a tensor of any type may share a frame of its bytes.
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
    """The canonical bytes of a bundle: its table of contents.  One of an exact patch names the
    table of the `exact` values: its slices have no hashes, which tell other bundles apart.
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
    """Read a bundle.  Raises CorruptionError."""
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
            raise CorruptionError("a frame shares the mask of a frame that is not before it")
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
    """Return where the slices of a frame start: one after another from `end` on, if unsaid."""
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
class LetGo:
    """A fade (the exact patch of parts) or a drop (parts; whole commits, where it names none) by a
    rule; or the undoing of such records, by their ids.  `after` says which generation each branch
    was at, where that matters: clocks go wrong.

    Written durably before anything is deleted; a patch or bundle that is missing without such a
    record is damage.
    """

    what: str
    commits: tuple[ObjectId, ...]
    parts: tuple[str, ...]
    rule: str
    time: str
    undoes: tuple[ObjectId, ...] = ()
    after: tuple[tuple[str, int], ...] = ()


def dump_let_go(record: LetGo) -> bytes:
    """The canonical bytes of a fade or drop record."""
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


def load_let_go(data: bytes) -> LetGo:
    """Read a fade or drop record.  Raises CorruptionError."""
    record = load(data, "a record")
    if record.text("what") not in ("fade", "drop", "undo"):
        raise CorruptionError("a record is none of fade, drop, undo")
    return LetGo(
        record.text("what"),
        tuple(checked_id(name) for name in record.texts("commits")),
        tuple(record.texts("parts")),
        record.text("rule"),
        record.text("time"),
        tuple(map(checked_id, record.texts("undoes") if record.has("undoes") else ())),
        record.pairs("after") if record.has("after") else (),
    )
