"""Verify: prove that everything that is promised can be read.

packs     every byte of every pack against the pack's name
commits   every object that a commit needs is there and is what its id says
tensors   every table of values decodes to its hashes, each distinct table once
files     every skeleton fits its schema; an exact file has its hash when put together
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptvcs.chain import ChainReader
from ckptvcs.errors import CkptError, MissingObjectError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.history.refs import HEAD, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.restore import Restorer, safe_path
from ckptvcs.store.object import ObjectId, PackId
from ckptvcs.store.pack import FOLDERS

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: what, in which commit (if known), in which file or tensor."""

    what: str
    message: str
    commit: str | None = None
    name: str | None = None


@dataclass
class Report:
    """What was looked at, and what was wrong."""

    packs: int = 0
    commits: int = 0
    tensors: int = 0
    files: int = 0
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)


class Verifier:
    """Verifies one repository."""

    def __init__(self, catalog: Catalog, refs: Refs, progress: Progress) -> None:
        self._catalog, self._refs, self._progress = catalog, refs, progress
        self._chain = ChainReader(catalog)
        self._proven: set[ObjectId] = set()
        self.report = Report()

    def _wrong(
        self, what: str, error: CkptError, commit: str | None = None, name: str | None = None
    ) -> None:
        self.report.damage.append(Damage(what, error.message, commit, name))

    def run(self) -> Report:
        """Look at everything; damage is collected, not raised."""
        self._packs()
        self._commits()
        return self.report

    def _packs(self) -> None:
        store = self._catalog.store
        store.refresh()
        self._catalog.forget()  # what is remembered proves nothing
        for folder in FOLDERS:
            for name in store.backend.names(folder):
                stem = name.rpartition("/")[2].removesuffix(".pack")
                try:
                    info = store.verify_pack(PackId(stem), folder)
                    self.report.packs += 1
                    self.report.bytes += info.size_bytes
                    self._progress(info.size_bytes)
                except CkptError as error:
                    self._wrong("pack", error, name=name)

    def _roots(self) -> dict[str, ObjectId]:
        roots: dict[str, ObjectId] = {}
        names = [HEAD, *(f"heads/{n}" for n in self._refs.names("heads")),
                 *(f"tags/{n}" for n in self._refs.names("tags")),
                 *(f"pins/{n}" for n in self._refs.names("pins"))]  # fmt: skip
        for name in names:
            try:
                self._refs.check(name)
                self._refs.reflog(name)
            except CkptError as error:
                self._wrong("ref", error, name=name)
        # What only older generations name may have been swept.
        with contextlib.suppress(CkptError):
            roots = dict(Revisions(self._catalog, self._refs).tips())
        return roots

    def _commits(self) -> None:
        revisions = Revisions(self._catalog, self._refs)
        seen: set[ObjectId] = set()
        hidden = self._catalog.dropped().commits
        for origin, root in self._roots().items():
            try:
                for name, _ in revisions.reachable([root]):
                    if name not in seen and name not in hidden:
                        seen.add(name)
                        self._commit(name)
            except CkptError as error:
                self._wrong("commit", error, commit=root, name=origin)

    def _commit(self, name: ObjectId) -> None:
        self.report.commits += 1
        try:
            restorer = Restorer(self._catalog, name)
            if restorer.commit.errors is not None:
                self._catalog.errors(restorer.commit.errors)
        except CkptError as error:
            self._wrong("commit", error, commit=name)
            return
        commit = restorer.commit
        damaged = len(self.report.damage)
        gone = self._catalog.dropped().parts.get(name, frozenset())
        for part, state in commit.parts.items():
            if part in gone:
                continue
            for table in (state.values, state.exact):
                if table is not None and (table == state.values or self._catalog.recipes(table)):
                    self._table(name, table, [
                        restorer.schema.tensors[n] for n in restorer.schema.stored(part)
                    ])  # fmt: skip
        self._patches(name, commit)
        if gone or len(self.report.damage) > damaged:
            return  # the files made of these tensors are damaged with them
        for file in commit.files:
            try:
                safe_path(file.path)
                if file.skeleton is not None:
                    restorer.digest(file)
                self.report.files += 1
            except CkptError as error:
                self._wrong("file", error, commit=name, name=file.path)

    def _patches(self, name: ObjectId, commit: Commit) -> None:
        """A patch may be missing only where a record says so."""
        if not commit.patch_bytes:
            return
        gone = {part for record in self._catalog.let_go(name) for part in record.parts or PARTS}
        for part, state in commit.parts.items():
            if state.exact and part not in gone and not self._catalog.has_recipe(state.exact):
                error = MissingObjectError(f"the exact patch of the {part} part is gone")
                self._wrong("patch", error, commit=name)

    def _table(self, name: ObjectId, table: ObjectId, infos: list) -> None:  # type: ignore[type-arg]
        if table in self._proven:
            return
        damaged = len(self.report.damage)
        for position, info in enumerate(infos):
            try:
                for words in self._chain.slices(table, position, info):
                    self._progress(words.nbytes)
                self.report.tensors += 1
            except CkptError as error:
                self._wrong("tensor", error, commit=name, name=info.name)
        if len(self.report.damage) == damaged:
            self._proven.add(table)
