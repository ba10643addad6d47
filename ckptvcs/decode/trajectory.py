"""Decode the states of a sequence of commits, decoding each frame once.

    commit n-1 --decoded--> bases of n stay in memory --frames of n only--> commit n

Before a commit is decoded, the tensors that the next commit depends on are determined. Only these
stay in memory, in the form of the base (near, even if the commit is restored exactly). A chain that
does not depend on the previous commit is decoded from its keyframe, which is slower. Each tensor is
checked against its hash. If a caller changed a base in place, it is decoded again.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ckptvcs.checkpoint.matching import alike
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import Bytes, Words, word_type
from ckptvcs.decode.chain import ChainReader, DecodedTable, Link
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.part_reader import PartReader, Window, windows
from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.files.targets import Target
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.schema import Schema
from ckptvcs.parallel import Progress
from ckptvcs.store.ids import ObjectId

_MAX_LISTED = 4

T = TypeVar("T")


# -- names -----------------------------------------------------------------------------------------


def select_tensors(schema: Schema, globs: Iterable[str]) -> dict[str, Window]:
    """Return the tensors whose name matches a glob; `*` also matches dots."""
    patterns = list(globs)
    return {
        name: window
        for name, window in windows(schema).items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def find_tensor(schema: Schema, name: str) -> tuple[str, Window]:
    """Return the full name and the view of a tensor, given its name or a suffix of it.

    A suffix begins after a dot or a colon. If several names match, one that only adds a top-level
    key (`model`) is preferred. If none matches, `name` may be its name at another training step.

    Raises:
        NotFoundError: no name matches; the hint has similar names.
        InvalidInputError: several names match; the hint lists them.
    """
    named = windows(schema)
    if name in named:
        return name, named[name]
    ends = [full for full in named if name and full.endswith((f".{name}", f":{name}"))]
    tops = [full for full in ends if "." not in full[: -len(name) - 1].rpartition(":")[2]]
    if len(ends) == 1 or len(tops) == 1:
        full = (ends if len(ends) == 1 else tops)[0]
        return full, named[full]
    if ends:
        more = ", ..." if len(ends) > _MAX_LISTED else ""
        raise InvalidInputError(
            f"ambiguous tensor name '{name}'",
            hint=f"use one of {', '.join(sorted(ends, key=len)[:_MAX_LISTED])}{more}",
        )
    same = alike(list(named), [name]).get(name)
    if same is not None:
        return same, named[same]
    close = difflib.get_close_matches(name, named, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "'ckpt ls' lists them"
    raise NotFoundError(f"no tensor is named '{name}'", hint=hint)


# -- decoding --------------------------------------------------------------------------------------


class _Kept(DecodedTable):
    """Decoded tensors of a hash table, by position."""

    def __init__(self) -> None:
        self.tensors: dict[int, Bytes] = {}

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        data = self.tensors.get(tensor)
        if data is None:
            return None
        return data.view(word_type(word))[number * SLICE_WORDS :][:SLICE_WORDS]

    def has(self, tensor: int) -> bool:
        return tensor in self.tensors


class _Seen(DecodedTable):
    """A hash table, to find which of its tensors a commit also has; it returns no slices."""

    def __init__(self, values: ObjectId, hashes: list[bytes], known: _Known) -> None:
        self.values, self._hashes, self._known = values, hashes, known

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        return None

    def has(self, tensor: int) -> bool:
        return tensor < len(self._hashes) and self._hashes[tensor] in self._known

    def owner(self, tensor: int) -> tuple[Restorer, int]:
        return self._known[self._hashes[tensor]]


_Known = dict[bytes, tuple[Restorer, int]]  # hash -> restorer and number of the tensor


@dataclass(frozen=True)
class _Stop:
    """A commit of the sequence: its restorers, and the stored tensors to decode."""

    reader: PartReader
    restorer: Restorer
    near: Restorer
    numbers: list[int]


@dataclass(frozen=True)
class _Bridge:
    """A base of the next commit: its place there, and its restorer and number here."""

    place: tuple[ObjectId, int]
    owner: Restorer
    number: int


class Trajectory:
    """Decodes tensors of commits, in the given order.

    `wanted` returns the tensors to decode from commits with a schema, given its id.
    """

    def __init__(
        self, catalog: Catalog, wanted: Callable[[ObjectId], Mapping[str, Window]]
    ) -> None:
        self._catalog, self._wanted = catalog, wanted
        self._kept: dict[ObjectId, _Kept] = {}

    def readers(self, names: Sequence[ObjectId]) -> Iterator[tuple[ObjectId, PartReader]]:
        """Yield each commit with its reader, which has decoded the wanted tensors.

        Raises:
            CorruptionError: a tensor does not decode to its recorded hash.
        """
        ahead = self._stop(names[0]) if names else None
        for number, name in enumerate(names):
            assert ahead is not None
            here, last = ahead, number + 1 == len(names)
            ahead = None if last else self._stop(names[number + 1])
            kept = self._decode(here, [] if ahead is None else list(self._bridges(here, ahead)))
            yield name, here.reader
            # Keep only the bases of the next commit.
            self._kept = kept
            del here

    def forget(self) -> None:
        """Free the tensors of the last commit on which the next one does not depend."""
        self._kept = {}

    def _stop(self, name: ObjectId) -> _Stop:
        decoded = lambda values: self._kept.get(values)  # noqa: E731  `_kept` changes
        restorer = Restorer(self._catalog, name, decoded=decoded)
        near = Restorer(self._catalog, name, near=True, decoded=decoded)
        infos = restorer.schema.tensors
        wanted = dict.fromkeys(n for n, _ in self._wanted(restorer.commit.schema).values())
        numbers = [number for number in wanted if not infos[number].inline]
        return _Stop(PartReader(restorer), restorer, near, numbers)

    def _bridges(self, here: _Stop, then: _Stop) -> Iterator[_Bridge]:
        """Yield the bases of the next commit that this commit has."""
        known: _Known = {}
        infos = here.restorer.schema.tensors
        stored = [number for number, info in enumerate(infos) if not info.inline]
        # The last tensor with a hash counts: wanted tensors are decoded anyway.
        for owner, numbers in (
            (here.near, stored),
            (here.restorer, stored),
            (here.restorer, here.numbers),
        ):
            for number in numbers:
                values, position = owner.place(number)
                known[self._catalog.value(values, position)] = owner, number
        chain = ChainReader(self._catalog, lambda values: self._seen(values, known))
        for number in then.numbers:
            links = chain.links(*then.restorer.place(number), then.restorer.schema.tensors[number])
            yield from _lowest(links[0])
            for link in links:
                if link.companion:
                    yield from _lowest(link.companion[0])

    def _seen(self, values: ObjectId, known: _Known) -> _Seen | None:
        with contextlib.suppress(CorruptionError):  # gc may have deleted tables of dropped commits
            return _Seen(values, self._catalog.values(values), known)
        return None

    def _decode(self, here: _Stop, bridges: list[_Bridge]) -> dict[ObjectId, _Kept]:
        """Decode the wanted tensors of a commit; return the bases of the next one."""
        near = dict.fromkeys(b.number for b in bridges if b.owner is here.near)
        decoded = dict(here.near.tensors(list(near)))
        for number, data in decoded.items():  # exact patches are based on these
            _keep(self._kept, here.near.place(number), data)
        others = [b.number for b in bridges if b.owner is here.restorer]
        here.reader.decode_ahead([*here.numbers, *others])
        self._kept = {}
        for number in here.numbers:
            _keep(self._kept, here.restorer.place(number), here.reader.raw(number))
        kept: dict[ObjectId, _Kept] = {}
        for bridge in bridges:
            close = bridge.owner is here.near
            data = decoded[bridge.number] if close else here.reader.raw(bridge.number)
            _keep(kept, bridge.place, data)
        return kept


def _keep(kept: dict[ObjectId, _Kept], place: tuple[ObjectId, int], data: Bytes) -> None:
    kept.setdefault(place[0], _Kept()).tensors[place[1]] = data


def _lowest(link: Link) -> Iterator[_Bridge]:
    """Yield the lowest link of a chain as a base, if this commit has its tensor."""
    seen, position = link.decoded or (None, 0)
    if isinstance(seen, _Seen) and seen.has(position):
        yield _Bridge((seen.values, position), *seen.owner(position))


# -- states, series, export ------------------------------------------------------------------------


def states(
    catalog: Catalog, names: Sequence[ObjectId], globs: Sequence[str] | None
) -> Iterator[tuple[ObjectId, Any]]:
    """Yield the state of each commit, or with globs a flat dict of the matching tensors.

    Raises:
        NotFoundError: a glob matches no tensor of any of the commits.
    """
    if globs is None:
        trajectory = Trajectory(catalog, lambda schema: windows(catalog.schema(schema)))
        # `map`: loop variables would keep a state in memory while the next one is decoded.
        return map(_whole, trajectory.readers(names))
    schemas = dict.fromkeys(catalog.commit(name).schema for name in names)
    for glob in globs:
        if schemas and not any(select_tensors(catalog.schema(s), [glob]) for s in schemas):
            raise NotFoundError(f"no tensor matches '{glob}'", hint="run 'ckpt ls' to list them")

    @cache
    def select(schema: ObjectId) -> dict[str, Window]:
        return select_tensors(catalog.schema(schema), globs)

    def state(found: tuple[ObjectId, PartReader]) -> tuple[ObjectId, dict[str, Any]]:
        return found[0], found[1].tensors(select(catalog.commit(found[0]).schema))

    return map(state, Trajectory(catalog, select).readers(names))


def _whole(found: tuple[ObjectId, PartReader]) -> tuple[ObjectId, Any]:
    return found[0], found[1].state()


def series(
    catalog: Catalog, names: Sequence[ObjectId], tensor: str
) -> Iterator[tuple[ObjectId, Any]]:
    """Yield one tensor of each commit that has it, by a name or suffix as in `find_tensor`.

    Raises:
        NotFoundError: no commit has it.
        InvalidInputError: the name is ambiguous in a commit.
    """
    chosen: dict[ObjectId, dict[str, Window]] = {}
    missing = NotFoundError(f"no commits to search for tensor '{tensor}'")
    for schema in dict.fromkeys(catalog.commit(name).schema for name in names):
        try:
            full, window = find_tensor(catalog.schema(schema), tensor)
            chosen[schema] = {full: window}
        except NotFoundError as error:
            missing = error
    if not chosen:
        raise missing
    having = [name for name in names if catalog.commit(name).schema in chosen]

    def value(pair: tuple[ObjectId, PartReader]) -> tuple[ObjectId, Any]:
        (tensor,) = pair[1].tensors(chosen[catalog.commit(pair[0]).schema]).values()
        return pair[0], tensor

    return map(value, Trajectory(catalog, chosen.__getitem__).readers(having))


def written(
    catalog: Catalog,
    names: Sequence[ObjectId],
    part: str | None,
    write: Callable[[ObjectId, PartReader], T],
) -> Iterator[T]:
    """Yield the result of `write` for each commit, whose reader has decoded one part or all.

    While the caller uses the result, only the tensors that the next commit depends on are in
    memory.
    """

    @cache
    def choose(schema: ObjectId) -> dict[str, Window]:
        tensors = catalog.schema(schema).tensors
        named = windows(catalog.schema(schema)).items()
        return {name: w for name, w in named if part is None or tensors[w[0]].part == part}

    trajectory = Trajectory(catalog, choose)
    for name, reader in trajectory.readers(names):
        result = write(name, reader)
        reader.forget()
        trajectory.forget()
        yield result
        del result


def export(
    catalog: Catalog,
    names: Sequence[ObjectId],
    targets: Sequence[Path | Target],
    part: str | None,
    progress: Progress,
    *,
    force: bool = False,
) -> None:
    """Write each commit, or one part of it, to its target with `PartReader.export`.

    Raises:
        NotFoundError: a commit does not have that part.
    """
    rest = iter(targets)

    def write(_: ObjectId, reader: PartReader) -> None:
        reader.export(next(rest), part, progress, force=force)

    deque(written(catalog, names, part, write), 0)
