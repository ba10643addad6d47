"""Re-base chains: re-encode frames that depend on dropped commits.

Several deltas become one: near weights are multiples of a grid, so the sum of their deltas is a
difference of integers. No value changes: each tensor is checked against its hash before, and each
slice is decoded after. Commits keep their ids; a new recipe lists the new frames of a hash table.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ckptvcs.codec.dtypes import DTYPES, float_type
from ckptvcs.codec.frame import decode_slice, slices_of
from ckptvcs.codec.words import Words, octets
from ckptvcs.decode.base_cache import BaseWriter, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable
from ckptvcs.decode.stored_slice import read_slice
from ckptvcs.encode.assemble import NewPlace, Place, StoredPlace, recipe_of
from ckptvcs.encode.bases import match_tensors
from ckptvcs.encode.exact import reencode
from ckptvcs.encode.frame_writer import Region, Slice
from ckptvcs.encode.group import EncodedSlice
from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit
from ckptvcs.history.recipe import Between, Frame, dump_recipe
from ckptvcs.history.schema import TensorInfo
from ckptvcs.parallel import Progress, ordered_map
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.object_store import ObjectStore

REKEY_FLAGS = ("near", "near-2", "sparse", "types")
"""The features that a reader of re-encoded frames must know."""

_WASTE = 0.1  # unused share of a bundle, above which its other frames are copied


@dataclass(frozen=True)
class _Table:
    """The hash table of a part of a kept commit, and that of the nearest kept ancestor."""

    catalog: Catalog
    values: ObjectId
    part: str
    infos: tuple[TensorInfo, ...]
    below: _Table | None

    @cached_property
    def places_below(self) -> dict[int, StoredPlace]:
        """Return the places of the same tensors in the table below, by position."""
        if self.below is None:
            return {}
        matches = match_tensors(self.below.infos, self.infos)
        framed, values = self.catalog.framed, self.below.values
        return {new: framed(values, old) for new, old in matches.items()}


class _Bundle(Region):
    """The new bundle of a table: its frames, and old place -> number of the new frame.

    `cache` takes the decoded weights; `sharing` has the positions in the table of each old frame.
    """

    def __init__(self, store: ObjectStore, table: _Table, cache: BaseWriter | None) -> None:
        super().__init__(store)
        self.table, self.cache = table, cache
        self.frames: list[Frame] = []
        self.moved: dict[StoredPlace, int] = {}
        self.sharing: defaultdict[StoredPlace, list[int]] = defaultdict(list)

    def add(self, frame: Frame, old: StoredPlace) -> int:
        """Add a frame that replaces the one at `old`; return its number."""
        self.moved[old] = len(self.frames)
        self.frames.append(frame)
        return self.moved[old]


class Rekeyer:
    """Re-bases the chains of a repository that has no other writer."""

    def __init__(self, catalog: Catalog, cache: Path, depth: int, progress: Progress) -> None:
        """Limit chains to `depth`."""
        self._catalog, self._cache, self._depth = catalog, cache, depth
        self._progress = progress
        self._kept: set[ObjectId] = set()
        self._replaced: set[ObjectId] = set()
        self._moved: dict[StoredPlace, NewPlace] = {}
        self._decoded: dict[ObjectId, DecodedTable | None] = {}
        self._chain = ChainReader(catalog, self._decoded.get)

    def run(
        self,
        kept: Mapping[ObjectId, Commit],
        gone: Mapping[ObjectId, Set[str]],
        waiting: Set[ObjectId] = frozenset(),
        *,
        always: bool = True,
    ) -> int:
        """Re-encode tables that depend on commits not in `kept`; return their number.

        `gone` has the dropped parts of kept commits. Tables that are `waiting` stay as they are.
        Unless `always`, a table is re-encoded only if that takes less than what it depends on.

        Raises:
            CorruptionError: a tensor does not decode to its hash.
            StorageError: the disk is full; nothing has changed.
        """
        tables = list(self._tables(kept, gone))
        self._kept = {table.values for table in tables} | waiting
        self._kept.update(*(self._catalog.recipe(name).ends for name in self._kept))
        self._replaced = self._wasted(tables)
        count = 0
        for table in tables:  # ancestors first
            if self._stale(table):
                count += self._rewrite(table, always=always)
        return count

    # -- tables to re-encode ---------------------------------------------------------------------

    def _tables(
        self, kept: Mapping[ObjectId, Commit], gone: Mapping[ObjectId, Set[str]]
    ) -> Iterator[_Table]:
        """Yield the tables of the kept commits, ancestors first, each table once."""
        tables: dict[tuple[ObjectId, str], _Table | None] = {}
        seen: set[ObjectId] = set()
        for name in self._downwards(kept):
            commit = kept[name]
            schema = self._catalog.schema(commit.schema)
            above = (
                next((n for n, _ in self._catalog.ancestors(commit.parents[0]) if n in kept), None)
                if commit.parents
                else None
            )
            for part, state in commit.parts.items():
                below = tables.get((above, part)) if above else None
                if part in gone.get(name, ()):
                    tables[name, part] = below
                    continue
                infos = tuple(schema.tensors[number] for number in schema.stored(part))
                table = tables[name, part] = _Table(self._catalog, state.values, part, infos, below)
                if state.values not in seen:
                    seen.add(state.values)
                    yield table

    def _downwards(self, kept: Mapping[ObjectId, Commit]) -> Iterator[ObjectId]:
        """Yield the kept commits, ancestors first."""
        seen: set[ObjectId] = set()
        for tip in kept:
            path = []
            for name, _ in self._catalog.ancestors(tip):
                if name in seen:
                    break
                seen.add(name)
                path.append(name)
            yield from (name for name in reversed(path) if name in kept)

    def _wasted(self, tables: Iterable[_Table]) -> set[ObjectId]:
        """Return the bundles that waste too much space."""
        used: dict[ObjectId, set[int]] = {}
        for table in tables:
            recipe = self._catalog.recipe(table.values)
            for bundle, frame in recipe.frame_places():
                used.setdefault(bundle, set()).add(frame)
        wasted = set()
        for name, numbers in used.items():
            sizes = [frame.size_bytes for frame in self._catalog.bundle(name)]
            if sum(sizes[number] for number in numbers) < (1 - _WASTE) * sum(sizes):
                wasted.add(name)
        return wasted

    def _stale(self, table: _Table) -> bool:
        return any(
            place in self._moved or place[0] in self._replaced or self._must_change(frame)
            for place, frame in self._places(table).values()
        )

    def _must_change(self, frame: Frame) -> bool:
        dropped = frame.base is not None and frame.base[0] not in self._kept
        return dropped or frame.depth > self._depth

    def _places(self, table: _Table) -> dict[int, tuple[StoredPlace, Frame]]:
        """Return the place and frame of each tensor of a table that has a frame, by position."""
        recipe = self._catalog.recipe(table.values)
        places = enumerate(map(recipe.place, range(len(recipe.frames))))
        return {
            position: (place, self._catalog.frame_at(*place))
            for position, place in places
            if not isinstance(place, Between)
        }

    # -- re-encoding ---------------------------------------------------------------------------

    def _rewrite(self, table: _Table, *, always: bool) -> bool:
        """Publish a recipe of a later generation, and a new bundle for the frames that move.

        Return whether that was done.
        """
        store = self._catalog.store
        self._load_base(table.below)
        with ExitStack() as stack:  # calls all, even if one raises
            base = BaseWriter(self._cache, table.infos) if table.part == "model" else None
            if base is not None:
                stack.callback(base.abort)
            bundle = _Bundle(store, table, base)
            stack.callback(bundle.abort)
            meta = store.new_pack("meta")
            stack.callback(meta.abort)
            places, replaced = self._places(table), self._replaced.copy()
            for position, (place, _) in places.items():
                bundle.sharing[place].append(position)
            self._replaced |= {
                place[0] for place, frame in places.values() if self._must_change(frame)
            }
            new = [self._move(bundle, position) for position in range(len(table.infos))]
            if not always and not self._frees(bundle):
                self._replaced = replaced
                return False
            name: ObjectId | None = None
            if bundle.frames:
                name, _ = bundle.publish(bundle.frames)
            recipe = recipe_of(self._catalog, table.values, new, name)
            meta.add(Kind.RECIPE, dump_recipe(recipe))
            store.publish(meta)  # readers use the new frames from now on
            self._moved |= {old: (name, number) for old, number in bundle.moved.items()}
            if base is not None:
                base.finish(table.values)  # only if all tensors were re-encoded
        self._catalog.forget_recipes()
        return True

    def _frees(self, bundle: _Bundle) -> bool:
        """Return whether the new frames take less than the old ones and what only these need.

        A frame that is copied leaves a bundle that is mostly waste.
        """
        old = [self._catalog.frame_at(*place) for place in bundle.moved]
        below: dict[StoredPlace, Frame] = {}
        for frame in old:
            if not self._must_change(frame) or frame.depth > self._depth:
                return True
            while frame.base is not None and frame.base[0] not in self._kept:
                place = self._catalog.frame_place(*frame.base)
                if place in below:
                    break
                frame = below[place] = self._catalog.frame_at(*place)
        size = sum(frame.size_bytes for frame in (*old, *below.values()))
        return sum(frame.size_bytes for frame in bundle.frames) < size

    def _load_base(self, table: _Table | None) -> None:
        """Use the cached base of a table, if any."""
        self._decoded.clear()
        if table is not None and table.part == "model":
            self._decoded[table.values] = find_decoded(
                self._catalog, self._cache, None, table.values, table.infos
            )

    def _move(self, bundle: _Bundle, position: int) -> Place:
        """Re-encode, copy or keep the frame of a tensor; return its place."""
        place = self._catalog.place(bundle.table.values, position)
        self._progress(bundle.table.infos[position].size_bytes)
        if isinstance(place, Between):
            return place
        if place in self._moved:
            return self._moved[place]
        if place in bundle.moved:
            return None, bundle.moved[place]
        if self._must_change(self._catalog.frame_at(*place)):
            return None, self._reencode(bundle, position)
        return place if place[0] not in self._replaced else (None, self._copy(bundle, place))

    def _reencode(self, bundle: _Bundle, position: int) -> int:
        """Re-encode a tensor against the nearest kept commit, or without a base."""
        table = bundle.table
        place = self._catalog.frame_place(table.values, position)
        frame = self._catalog.frame_at(*place)
        base = table.places_below.get(position)
        depth = 0 if base is None else self._chain.depth(*base) + 1
        if depth > min(frame.depth, self._depth):
            base = None
        slices, uses_base = self._encode(bundle, position, base)
        if not uses_base:
            base, depth = None, 0
        dtype = float_type(table.infos[position].dtype)
        return bundle.add(Frame(base, depth, None, slices, dtype), place)

    def _encode(
        self, bundle: _Bundle, position: int, base: StoredPlace | None
    ) -> tuple[tuple[Slice, ...], bool]:
        """Re-encode a tensor; also return whether any slice depends on the base."""
        table = bundle.table
        info, chain = table.infos[position], self._chain
        dtype = float_type(info.dtype)
        place = self._catalog.frame_place(table.values, position)
        if self._catalog.frame_at(*place).dtype is None:
            deque(chain.slices(table.values, position, info), 0)  # infers the types of frames
        links = chain.links(table.values, position, info)
        base_links = None if base is None else chain.links(*base, info)

        def encode(number: int) -> tuple[Words, Words | None, EncodedSlice]:
            words = chain.decode_slice(links, info, number)
            below = None if base_links is None else chain.decode_slice(base_links, info, number)
            encoded = reencode(words, below, dtype)
            decoded = decode_slice(memoryview(encoded.data), DTYPES[dtype], words.size, below)
            if not np.array_equal(decoded, words):
                raise CorruptionError(f"re-encoding {info.name} would change it")
            return words, below, encoded

        digest, base_digest = hasher(), hasher()
        slices, uses_base = [], False
        jobs = ordered_map(encode, slices_of(info.words), lambda _: info.words)
        for number, (words, below, encoded) in enumerate(jobs):
            digest.update(octets(words))
            if below is not None:
                base_digest.update(octets(below))
            if bundle.cache is not None:
                for sharer in bundle.sharing[place]:
                    bundle.cache.write(sharer, number, words)
            slices.append(bundle.write(encoded.data))
            uses_base |= encoded.uses_base
        wrong = digest.digest() != self._catalog.value(table.values, position)
        if wrong or (base is not None and base_digest.digest() != self._catalog.value(*base)):
            raise CorruptionError(f"{info.name} does not decode to its recorded hash")
        return tuple(slices), uses_base

    def _copy(self, bundle: _Bundle, place: StoredPlace) -> int:
        """Copy a frame unchanged, with its auxiliary frame; return its new number."""
        owner, frame = place[0], self._catalog.frame_at(*place)
        companion = None
        if frame.companion is not None:
            companion = self._companion(bundle, (owner, frame.companion))
        slices = [
            bundle.write(read_slice(self._catalog, owner, frame, index))
            for index in range(len(frame.slices))
        ]
        copy = replace(frame, companion=companion, slices=tuple(slices))
        return bundle.add(copy, place)

    def _companion(self, bundle: _Bundle, place: StoredPlace) -> int:
        """Return the auxiliary frame in the new bundle, copied or re-encoded."""
        if place in bundle.moved:
            return bundle.moved[place]
        if self._must_change(self._catalog.frame_at(*place)):
            for position in bundle.sharing[place][:1]:
                return self._reencode(bundle, position)
        return self._copy(bundle, place)
