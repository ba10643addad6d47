"""What takes the space of a repository: each byte on disk belongs to a commit, a part and a kind.

A frame belongs to the first commit that refers to it, parents before children, and to its tensor.
Everything else in a pack is structure: schemas, file templates, hash tables, recipes, commits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptvcs.checkpoint.optimizer_state import MOMENTS
from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.errors import CorruptionError, InvalidInputError
from ckptvcs.gc.collect import files_bytes, stored_bytes
from ckptvcs.history.commit import Commit
from ckptvcs.history.recipe import Between, Frame
from ckptvcs.history.schema import Schema
from ckptvcs.ops.layers import layers_of
from ckptvcs.ops.repository import CACHE, Repository
from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.pack import Entry, pack_name, packed_size

GROUPS = ("kind", "commit", "part", "layer", "tensor")
"""The ways to group bytes."""

KEYFRAME, DELTA, PATCH, TENSORS = "keyframe", "delta", "patch", "other tensors"
STRUCTURE, UNUSED, REFS, CACHED = "structure", "unused", "refs", "cache"
_NEEDED = frozenset(Kind) - {Kind.RECORD, Kind.NOTE}
"""Kinds of objects that are unused if no commit refers to them."""


@dataclass(frozen=True)
class UsageRow:
    """Some bytes on disk.

    Attributes:
        name: The kind, part, layer or tensor; for a commit its id.
        commit: The id of the commit, if the bytes are grouped by commit.
        step: The training step of that commit, if known.
        size_bytes: The number of bytes.
        kinds: The bytes of each kind: `keyframe` and `delta` (weights), the roles of moments,
            `other tensors`, `patch` (exact patches), `structure`, `unused` (the next gc can delete
            them), `refs` (with settings), and `cache`.
    """

    name: str
    commit: ObjectId | None
    step: int | None
    size_bytes: int
    kinds: Mapping[str, int]


@dataclass(frozen=True)
class DiskUsage:
    """The bytes of a repository on disk, or of some of its commits.

    Attributes:
        by: How the rows are grouped.
        rows: The groups, the largest first; commits, the newest first.
        size_bytes: The sum of all rows.
    """

    by: str
    rows: tuple[UsageRow, ...]
    size_bytes: int


@dataclass(frozen=True)
class _Owner:
    """What some bytes belong to."""

    commit: ObjectId | None = None
    part: str | None = None
    tensor: str | None = None
    layer: str | None = None
    kind: str = STRUCTURE


@dataclass
class _Owners:
    """The owners of all objects and frames that commits refer to."""

    objects: dict[ObjectId, _Owner] = field(default_factory=dict)
    frames: dict[tuple[ObjectId, int], _Owner] = field(default_factory=dict)


def disk_usage(repository: Repository, commits: Sequence[ObjectId] | None, by: str) -> DiskUsage:
    """Return what takes the space; see `Repo.disk_usage`."""
    if by not in GROUPS:
        raise InvalidInputError(f"unknown group '{by}'", hint=f"use one of {', '.join(GROUPS)}")
    repository.catalog.store.refresh()
    history = repository.revisions.commits()
    sizes: Counter[_Owner] = Counter()
    for owner, size in _everything(repository, history):
        if commits is None or owner.commit in commits:
            sizes[owner] += size
    rows: dict[str, Counter[str]] = {}
    for owner, size in sizes.items():
        if not size:  # such as of a tensor that shares its bytes with another one
            continue
        rows.setdefault(_group(owner, by), Counter())[owner.kind] += size
    found = [_row(name, kinds, history if by == "commit" else {}) for name, kinds in rows.items()]
    order = {str(n): place for place, n in enumerate(repository.history.newest_first())}
    if by == "commit":
        found.sort(key=lambda row: (row.commit is None, order.get(row.name, 0), -row.size_bytes))
    else:
        found.sort(key=lambda row: (-row.size_bytes, row.name))
    return DiskUsage(by, tuple(found), sum(row.size_bytes for row in found))


def _group(owner: _Owner, by: str) -> str:
    if by == "kind":
        return owner.kind
    key = {"commit": owner.commit, "part": owner.part, "layer": owner.layer}.get(by, owner.tensor)
    return key or owner.kind


def _row(name: str, kinds: Counter[str], commits: Mapping[ObjectId, Commit]) -> UsageRow:
    commit = commits.get(ObjectId(name))
    return UsageRow(
        name,
        None if commit is None else ObjectId(name),
        None if commit is None else commit.step,
        kinds.total(),
        dict(kinds.most_common()),
    )


def _everything(
    repository: Repository, commits: Mapping[ObjectId, Commit]
) -> Iterator[tuple[_Owner, int]]:
    """Yield all bytes on disk with their owners."""
    catalog, backend = repository.catalog, repository.backend
    owners = _find_owners(repository, commits)
    patches, total = catalog.patches().keys(), 0
    for pack, folder in catalog.store.list_packs().items():
        with contextlib.suppress(FileNotFoundError):  # another process may delete it
            size = backend.size(pack_name(folder, pack))
            entries = _entries(repository, pack, folder)
            shares = _shares(repository, entries, size, owners)
            if any(entry.id in patches for entry in entries):
                shares = [(replace(owner, kind=PATCH), count) for owner, count in shares]
            yield from shares
            total += size
    yield _Owner(kind=REFS), stored_bytes(backend) - total
    yield _Owner(kind=CACHED), files_bytes(backend, backend.names(CACHE))


def _entries(repository: Repository, pack: PackId, folder: str) -> tuple[Entry, ...]:
    """Return the objects of a pack; none if its table of contents is damaged."""
    with contextlib.suppress(CorruptionError):
        return repository.catalog.store.entries(pack, folder)
    return ()


def _shares(
    repository: Repository, entries: Sequence[Entry], size: int, owners: _Owners
) -> list[tuple[_Owner, int]]:
    """Return the owners of the bytes of a pack."""
    shares: list[tuple[_Owner, int]] = []
    empty = packed_size(())
    for entry in entries:
        if entry.id not in owners.objects and entry.kind not in _NEEDED:
            continue
        owner = owners.objects.get(entry.id, _Owner(kind=UNUSED))
        left = packed_size((entry,)) - empty
        if entry.kind == Kind.BUNDLE:
            frames = _shares_of_bundle(repository, entry, owner, owners)
            left -= sum(count for _, count in frames)
            shares += frames
        shares.append((owner, left))
    # Records, the header and the trailer go to the first commit in the pack.
    first = next((owner for owner, _ in shares if owner.commit is not None), _Owner())
    rest = size - sum(count for _, count in shares)
    return [*shares, (replace(first, tensor=None, layer=None, kind=STRUCTURE), rest)]


def _shares_of_bundle(
    repository: Repository, entry: Entry, bundle: _Owner, owners: _Owners
) -> list[tuple[_Owner, int]]:
    """Return the owners of the slices of a bundle; tensors with equal bytes share slices."""
    frames: tuple[Frame, ...] = ()
    with contextlib.suppress(CorruptionError):
        frames = repository.catalog.bundle(entry.id)
    unknown = bundle if bundle.kind == UNUSED else replace(bundle, kind=TENSORS)
    found = [owners.frames.get((entry.id, number)) for number in range(len(frames))]
    for frame, owner in zip(frames, [*found], strict=True):
        if frame.companion is not None and found[frame.companion] is None:
            found[frame.companion] = owner
    seen: set[tuple[int, int]] = set()
    shares = []
    for frame, owner in zip(frames, found, strict=True):
        slices = {(start, length) for start, length, _ in frame.slices} - seen
        seen |= slices
        shares.append((owner or unknown, sum(length for _, length in slices)))
    # A damaged bundle may claim more bytes than it has.
    return shares if sum(count for _, count in shares) <= entry.region_bytes else []


def _find_owners(repository: Repository, commits: Mapping[ObjectId, Commit]) -> _Owners:
    """Return the owners of the objects and frames of commits, parents before children."""
    catalog, owners = repository.catalog, _Owners()
    for name in _parents_first(commits):
        commit, own = commits[name], _Owner(name)
        objects: list[ObjectId | None] = [name, commit.schema, commit.errors, commit.provenance]
        for found in [*objects, *(file.skeleton for file in commit.files)]:
            if found is not None:
                owners.objects.setdefault(found, own)
        with contextlib.suppress(CorruptionError):  # gc may have deleted dropped data
            schema = catalog.schema(commit.schema)
            layers = layers_of(schema)
            states = [*commit.parts.items(), *catalog.original(name).parts.items()]
            for part, state in states:
                mine = replace(own, part=part)
                for table in filter(None, (state.values, state.exact)):
                    _own_table(repository, table, mine, schema, layers, owners)
    return owners


def _parents_first(commits: Mapping[ObjectId, Commit]) -> list[ObjectId]:
    found: dict[ObjectId, None] = {}
    for tip in commits:
        line: list[ObjectId] = []
        name: ObjectId | None = tip
        while name is not None and name in commits and name not in found:
            line.append(name)
            name = next(iter(commits[name].parents), None)
        found |= dict.fromkeys(line[::-1])
    return [*found]


def _own_table(
    repository: Repository,
    table: ObjectId,
    own: _Owner,
    schema: Schema,
    layers: Sequence[str],
    owners: _Owners,
) -> None:
    """Give a hash table, its recipes, bundles and frames to a commit, unless they have an owner."""
    catalog = repository.catalog
    if table in owners.objects:
        return
    owners.objects[table] = own
    stored = schema.stored(own.part or "")
    for name, recipe in catalog.recipes(table):
        owners.objects.setdefault(name, own)
        for bundle in recipe.bundles:
            owners.objects.setdefault(bundle, own)
        for number, place in zip(
            stored, map(recipe.place, range(len(recipe.frames))), strict=False
        ):
            if isinstance(place, Between):
                continue
            (bundle, frame), info = place, schema.tensors[number]
            kind = info.role if info.role in MOMENTS else TENSORS
            if info.role == WEIGHT:
                with contextlib.suppress(CorruptionError):
                    based = catalog.frame_at(bundle, frame).base is not None
                    kind = DELTA if based else KEYFRAME
            frame_owner = replace(own, tensor=info.name, layer=layers[number], kind=kind)
            owners.frames.setdefault((bundle, frame), frame_owner)
