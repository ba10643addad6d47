"""Fading: exact patches that no rule keeps expire, and their commits become near.

plan     select patches by the rule
record   write fade records, durable before anything is deleted
delete   delete the packs of the patches; nothing else depends on them
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

from ckptvcs.errors import CorruptionError, StorageError
from ckptvcs.gc.retention import ExactRule
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit
from ckptvcs.history.records import DropRecord
from ckptvcs.history.refs import HEAD, Generation, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.store.ids import Kind, ObjectId, PackId

_LINE = 64  # a new commit checks only so many older ones, so that its cost is constant


@dataclass(frozen=True)
class Patch:
    """The exact patch of one part, which several commits may share, in its own pack.

    Attributes:
        values: The id of the hashes of the exact tensors.
        pack: The pack.
        folder: The folder of the pack.
        part: `model`, `optimizer` or `rest`.
        commits: The commits that the patch belongs to.
        size_bytes: The size of the pack in bytes.
    """

    values: ObjectId
    pack: PackId
    folder: str
    part: str
    commits: tuple[ObjectId, ...]
    size_bytes: int


@dataclass(frozen=True)
class Faded:
    """A commit that became near because its exact patches expired.

    Attributes:
        id: The id of the commit.
        commit: The commit.
        freed_bytes: The bytes of its patches.
    """

    id: ObjectId
    commit: Commit
    freed_bytes: int


class Fader:
    """Selects, records and deletes expired patches of one repository."""

    def __init__(self, catalog: Catalog, refs: Refs, rule: ExactRule) -> None:
        self._catalog, self._refs, self._rule = catalog, refs, rule
        self._revisions = Revisions(catalog, refs)

    def patches(self) -> list[Patch]:
        """Return every stored exact patch."""
        store, found = self._catalog.store, []
        for recipe, values in self._catalog.patches().items():
            holders = tuple(self._catalog.commits_of_exact(values))
            parts = (self._catalog.commit(name).parts_of_exact(values) for name in holders)
            part = next(chain.from_iterable(parts), "")
            found += [
                Patch(values, place.pack, place.folder, part, holders, store.pack_size(place.pack))
                for place in store.index.known(recipe)
            ]
        return found

    def after(
        self, parent: ObjectId | None, new: tuple[ObjectId, Commit] | None = None, *, is_head: bool
    ) -> list[Patch]:
        """Return the patches that expire on one line.

        The newest commit of the line is `new`, otherwise `parent`.  Unless the line `is_head`, the
        newest commits of HEAD's branch keep their patches too.
        """
        patches = [patch for patch in self.patches() if patch.commits]
        line = list(islice(self._catalog.line(parent), _LINE))
        if new is not None:
            line.insert(0, new)
        on_line = {name for name, _ in line}
        mine = [patch for patch in patches if on_line.issuperset(patch.commits)]
        if not mine:
            return []
        newest = [[name for name, _ in line]]
        if not is_head:
            newest.append(self._head_line())
        kept = self._kept(newest, patches, dict(line))
        return [patch for patch in mine if not self._is_needed(patch, kept)]

    def everywhere(self, known: dict[ObjectId, Commit]) -> list[Patch]:
        """Return the patches of `known` commits that expire.

        The newest commits of HEAD's branch and of the latest moved branch keep their patches.
        Patches without a known commit are left to the sweep.
        """
        patches = [patch for patch in self.patches() if known.keys() & set(patch.commits)]
        kept = self._kept([self._head_line(), self._latest_line()], [], known)
        return [patch for patch in patches if not self._is_needed(patch, kept)]

    def lasting(self) -> dict[ObjectId, frozenset[str]]:
        """Return the parts whose exact patches do not expire, whatever is committed next."""
        patches = self.patches() if self._rule.best is not None else []
        return self._kept([], patches, {})

    def _head_line(self) -> list[ObjectId]:
        """Return the newest commits of HEAD's branch; if detached, of its last branch."""
        branch = next((move.branch for move in self._refs.readable(HEAD) if move.branch), None)
        return self._line(self._refs.read(f"heads/{branch}") if branch else None)

    def _latest_line(self) -> list[ObjectId]:
        moves = [self._refs.read(f"heads/{name}") for name in self._refs.names("heads")]
        there = [move for move in moves if move is not None and move.commit is not None]
        return self._line(max(there, key=lambda move: move.time, default=None))

    def _line(self, move: Generation | None) -> list[ObjectId]:
        line = self._catalog.line(move.commit if move else None)
        return [name for name, _ in islice(line, self._rule.newest)]

    def _kept(
        self, lines: list[list[ObjectId]], patches: list[Patch], known: dict[ObjectId, Commit]
    ) -> dict[ObjectId, frozenset[str]]:
        candidates = dict(known)
        if self._rule.best is not None and patches:
            # Exclude commits that were undone or never reachable.
            there = self._revisions.ids() - self._catalog.dropped().commits
            candidates |= {
                name: self._catalog.commit(name)
                for patch in patches
                for name in patch.commits
                if name in there
            }
        tagged, pinned = self._refs.targets("tags"), self._refs.targets("pins")
        noted = self._catalog.noted(candidates.items())
        return self._rule.kept_parts(lines, tagged, pinned, noted)

    def record(self, patches: Iterable[Patch], time: str) -> list[DropRecord]:
        """Return the records that must be durable before patches are deleted."""
        parts: dict[ObjectId, set[str]] = {}
        for patch in patches:
            for name in patch.commits:
                parts.setdefault(name, set()).add(patch.part)
        groups: dict[tuple[str, ...], list[ObjectId]] = {}
        for name, gone in parts.items():
            groups.setdefault(tuple(sorted(gone)), []).append(name)
        rule = f"keep-exact {self._rule.newest}"
        return [
            DropRecord("fade", tuple(sorted(names)), gone, rule, time)
            for gone, names in groups.items()
        ]

    def faded(self, patches: Iterable[Patch]) -> tuple[Faded, ...]:
        """Return the commits that become near when patches are deleted, oldest first."""
        freed: dict[ObjectId, int] = {}
        for patch in patches:
            for name in patch.commits:
                freed[name] = freed.get(name, 0) + patch.size_bytes
        rows = [Faded(name, self._catalog.commit(name), size) for name, size in freed.items()]
        return tuple(sorted(rows, key=lambda row: (row.commit.time, row.id)))

    def delete(self, patches: Iterable[Patch]) -> None:
        """Delete patches whose records are durable; the next gc deletes the rest."""
        packs = {patch.pack: patch.folder for patch in patches if self._is_alone(patch)}
        if packs:
            # The commit that called this has succeeded: a failure here must not fail it.
            with contextlib.suppress(StorageError):
                self._catalog.store.backend.settle_seen()  # the refs that the records depend on
                self._catalog.store.delete_packs(packs)
            self._catalog.forget_recipes()

    def _is_needed(self, patch: Patch, kept: dict[ObjectId, frozenset[str]]) -> bool:
        """Return whether a commit that is not archived keeps a patch."""
        archived = self._catalog.archived()
        return any(
            patch.part in kept.get(name, ()) for name in patch.commits if name not in archived
        )

    def _is_alone(self, patch: Patch) -> bool:
        """Return whether a pack contains only this patch, by its own table of contents."""
        try:
            entries = self._catalog.store.entries(patch.pack, patch.folder)
        except (CorruptionError, FileNotFoundError):
            return False
        kinds = sorted(entry.kind for entry in entries)
        table = next((entry.id for entry in entries if entry.kind == Kind.VALUES), None)
        return kinds == [Kind.VALUES, Kind.RECIPE, Kind.BUNDLE] and table == patch.values
