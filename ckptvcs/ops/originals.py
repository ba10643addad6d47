"""May the files of a checkpoint be deleted, since the history has them?

find     the commit that holds, byte for byte, what is in a file or a directory (`Contents`)
reach    a ref leads to the commit: read now, by files and not by what is in memory
pin      where the commit is exact thanks to a patch that may fade
wait     for whoever may be about to delete that patch, and looked for pins before this one
prove    the commit comes back, and each original is what was committed
settle   the ref, the pin and all packs that the commit depends on are made durable
look     in a turn that is taken by all who move refs: the ref and the pin are there; then delete

docs/format.md, "Deletions", says why the order matters; tests/system/test_interleavings.py tries
them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ckptvcs.checkpoint.grouping import is_member
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.survey import Found
from ckptvcs.codec.spec import NearSpec
from ckptvcs.decode.base_cache import find_decoded
from ckptvcs.decode.chain import DecodedTable
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import (
    CkptError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    MissingObjectError,
)
from ckptvcs.files.names import safe_path
from ckptvcs.files.removal import Originals, Proven, Removed
from ckptvcs.gc.retention import PATCHED_PARTS
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit
from ckptvcs.history.reachability import mark, require_packs
from ckptvcs.history.refs import HEAD
from ckptvcs.ops.checkout import hash_file
from ckptvcs.ops.refs import set_pin
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import await_others, check_lease, lease, live_leases, turn

_DROPPED = "its commit was dropped"
_AGAIN = "try again when no other process commits"


@dataclass
class Removal:
    """What happened to the source files of a checkpoint.

    Attributes:
        removed: The deleted files.
        kept: Why files were kept; None if all were deleted.
        pinned: Whether the commit was pinned, so that its exact form is kept.
    """

    removed: list[Removed] = field(default_factory=list)
    kept: str | None = None
    pinned: bool = False


class Keeper:
    """Proves commits of one repository, and removes originals that can be had again."""

    def __init__(self, repo: Repository, codec: str | None) -> None:
        """`codec` is the one that commits are made with now, if not that of the settings.

        Raises:
            InvalidInputError: there is no such codec.
        """
        self._repo, self._codec = repo, codec
        repo.config.codec_of(codec)
        self._lease: str | None = None
        self._lines: dict[ObjectId, Set[ObjectId]] = {}
        self._last = HEAD  # a ref that led to a commit: it may lead to the next one, too

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Keep gc away while originals are removed, and know what it has dropped before.

        Raises:
            BusyError: gc is sweeping.
        """
        catalog = self._repo.catalog
        with lease(catalog.store.backend) as self._lease:
            catalog.store.refresh()
            catalog.forget()
            try:
                yield
            finally:
                self._lease = None

    def is_exact(self, name: ObjectId, progress: Progress) -> bool:
        """Prove a commit; see `ckptvcs.ops.originals`."""
        catalog, cache = self._repo.catalog, self._repo.bases
        return prove(catalog, cache, name, self._bound(catalog.commit(name).codec), progress)

    def _bound(self, codec: str) -> float:
        """The error that weights may have which a codec has coded: as it is set now; 0 for any."""
        config = self._repo.commit_config()
        try:
            own = config.codec_of(self._codec)
            spec = own if codec == own.name else config.codec_of(codec)
        except InvalidInputError:  # one of a newer program, or one that keeps no bounds
            return 0.0
        return spec.settings.max_weight_error if isinstance(spec.settings, NearSpec) else 0.0

    def why_kept(self, name: ObjectId, *, accept_near: bool) -> str | None:
        """Why the originals of a commit may not be removed; None if they may, as far as can be told
        without reading them.
        """
        if name in self._repo.catalog.dropped().commits:
            return _DROPPED
        entry = self._repo.entry(name)
        if accept_near:
            return None
        if entry.exact:
            fidelity = self._repo.config.pin_fidelity
            if _patched(entry.commit) <= PATCHED_PARTS[fidelity]:
                return None
            return f"it is exact for now only: pin-fidelity is '{fidelity}'"
        error = entry.commit.error.weight_rel
        off = f"weights off by {error:.2g}" if error else "its weights are exact"
        return f"its commit is only near ({off})"

    def remove(
        self,
        name: ObjectId,
        top: str,
        originals: Originals,
        progress: Progress,
        *,
        accept_near: bool,
    ) -> Removal:
        """Delete the file or directory `top` that a commit was made of; of one that was made of
        several files of the folder `top` is empty.

        The commit is restored once more, in the form that it has now, and each file is hashed once
        more; whatever is not as it was committed stays, and so does all to whose commit no ref
        leads any more.  Unless near is accepted, a commit that owes it to a patch that it is exact
        is pinned first, lest it fades later.

        The caller is `at_work`.
        """
        done = Removal(kept=self.why_kept(name, accept_near=accept_near))
        if done.kept is None:
            try:
                self._remove(name, PurePosixPath(top), originals, progress, done, accept_near)
            except CkptError as error:
                done.kept = error.message
        return done

    def _remove(
        self,
        name: ObjectId,
        top: PurePosixPath,
        originals: Originals,
        progress: Progress,
        done: Removal,
        accept_near: bool,
    ) -> None:
        commit = self._repo.catalog.commit(name)
        files = list(_source_files(commit, top))
        for path, size, _ in files:
            originals.check(path, size)
        ref = self._way(name, None)
        pin = f"pins/{name}" if _patched(commit) and not accept_near else None
        done.pinned = pin is not None and set_pin(self._repo, name, pinned=True)
        try:
            if pin is not None:
                self._await_faders(commit)
            if not self.is_exact(name, quiet) and not accept_near:
                raise ConflictError("its commit has faded to near")
            proven = [originals.prove(path, digest, progress) for path, _, digest in files]
            self._settle(name, commit, [ref] if pin is None else [ref, pin])
            self._delete(name, ref, pin, originals, proven, done)
        finally:
            if done.pinned and not done.removed:
                done.pinned = not set_pin(self._repo, name, pinned=False)
        if (
            commit.source == "directory"
            and top.name
            and not _remove_folders(commit, top, originals)
        ):
            done.kept = "its directory contains files that are not committed, or links"

    def _way(self, name: ObjectId, but: str | None) -> str:
        """A ref that leads to a commit, as refs are now, `but` not this one.

        Raises:
            ConflictError: there is none; or the commit was dropped.
        """
        if name in self._repo.catalog.dropped().commits:
            raise ConflictError(_DROPPED)
        revisions = self._repo.revisions
        for refs in ([self._last], revisions.tips()):
            for ref in refs:
                if ref != but and revisions.leads(ref, name, self._lines):
                    self._last = ref
                    return ref
        raise ConflictError("no branch leads to its commit any more")

    def _await_faders(self, commit: Commit) -> None:
        """Wait for those who may have looked for pins before this one was there, and delete the
        patches of a commit yet.

        Raises:
            ConflictError: they do not end.
        """
        catalog = self._repo.catalog
        backend = catalog.store.backend
        others = [one for one in live_leases(backend) if one != self._lease]
        if not others:  # who deletes patches holds a lease
            return
        catalog.store.refresh()
        catalog.forget()
        exact = [part.exact for part in commit.parts.values() if part.exact is not None]
        if any(map(catalog.is_fading, exact)) and not await_others(backend, others):
            raise ConflictError("another process may let its exact form go", hint=_AGAIN)

    def _settle(self, name: ObjectId, commit: Commit, refs: list[str]) -> None:
        """Make durable what the commit comes back from, whoever has written it."""
        catalog = self._repo.catalog
        marked = mark(catalog, {name: commit}, catalog.dropped())
        require_packs(catalog, marked, durable=True)
        catalog.store.backend.settle(["format"])
        for ref in refs:
            self._repo.refs.settle(ref)

    def _delete(
        self,
        name: ObjectId,
        ref: str,
        pin: str | None,
        originals: Originals,
        proven: list[Proven],
        done: Removal,
    ) -> None:
        """Delete files while nobody can take the commit back, or its pin.

        Raises:
            ConflictError: somebody has done so; or a file was touched.
        """
        backend = self._repo.catalog.store.backend
        with turn(backend):
            if self._lease is not None:
                check_lease(backend, self._lease)
            self._repo.catalog.forget_drops()
            again = self._way(name, pin if done.pinned else None)
            state = self._repo.refs.read(pin) if pin is not None else None
            if pin is not None and (state is None or state.commit is None):
                raise ConflictError("its commit was unpinned")
            if again != ref:
                self._repo.refs.settle(again)
            backend.settle_seen()
            for one in proven:
                done.removed.append(originals.delete(one))


def _source_files(commit: Commit, top: PurePosixPath) -> Iterator[tuple[PurePosixPath, int, str]]:
    """Yield the path, the size in bytes and the hash of each source file of a commit."""
    for file in commit.files:
        if file.skeleton is not None and file.hash is not None:
            path = top / file.path if commit.source == "directory" else top
            yield path, file.size, file.hash


def _remove_folders(commit: Commit, top: PurePosixPath, originals: Originals) -> bool:
    """Remove the empty directories of a commit; return whether all are removed."""
    folders = [top / f.path for f in commit.files if f.skeleton is None and f.link is None]
    removed = [originals.remove_directory(path) for path in [*folders[::-1], top]]
    return all(removed)


def _patched(commit: Commit) -> set[str]:
    """Return the parts that are exact through an exact patch."""
    return {name for name, part in commit.parts.items() if part.exact is not None}


def prove(catalog: Catalog, cache: Path, name: ObjectId, bound: float, progress: Progress) -> bool:
    """Restore a commit in the form that it has now; whether that is exact.

    Exact: each file has the hash that was committed.  Near: each tensor has the hash that was
    recorded, each file opens as what it was, and the relative error of the weights is within
    `bound` (0: whatever it is).

    The cached weights of the commit itself are not used: they were cached while they were coded,
    and do not show whether their frames can be read.  Those of its parent are used, against their
    hashes, so that a line that is proven commit after commit has each frame read once.

    Raises:
        CorruptionError: it is not so.
        NotFoundError: the commit, or a part of it, was dropped.
    """
    restorer = Restorer(catalog, name, cache=cache, decoded=_of_parent(catalog, cache, name).get)
    for file in restorer.commit.files:
        safe_path(file.path)  # a checkout refuses what leaves its target, originals or not
        if file.skeleton is None:
            continue
        digest = restorer.write_file(file, lambda _: None, progress)
        if restorer.exact and digest != file.hash:
            raise CorruptionError(f"{file.path} does not come back as it was")
        layout, numbers = restorer.layout(file)
        if layout.format != file.format or -1 in numbers:
            raise CorruptionError(f"{file.path} comes back as no {file.format} file")
    error = restorer.commit.error.weight_rel
    if not restorer.exact and bound and not error <= bound:
        raise CorruptionError(f"weights are off by {error:.2g}, more than {bound:.2g}")
    return restorer.exact


def _of_parent(
    catalog: Catalog, cache: Path, name: ObjectId
) -> dict[ObjectId, DecodedTable | None]:
    """The weights of a commit's parent, if the cache has them."""
    commit = catalog.commit(name)
    own = commit.parts.get("model")
    for parent in commit.parents[:1]:
        with contextlib.suppress(MissingObjectError):  # gc may have swept it
            above = catalog.commit(parent)
            state, schema = above.parts.get("model"), catalog.schema(above.schema)
            if state is not None and (own is None or state.values != own.values):
                infos = [schema.tensors[number] for number in schema.stored("model")]
                hashes = catalog.all_values(state.values, len(infos))
                return {state.values: find_decoded(cache, None, state.values, infos, hashes)}
    return {}


Content = str | frozenset[tuple[str, str]]
"""What a checkpoint holds: the hash of its file, or those of a directory's files by path."""


class Contents:
    """The commits of a repository, as far as they can be restored in full, by their content."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._commits: dict[Content, ObjectId] = {}
        self._members: dict[tuple[str, str], set[ObjectId]] = {}  # path and hash, in directories
        self._member_sizes: set[tuple[str, int]] = set()
        self._sizes: set[int] = set()
        self._content: dict[str, Content] = {}  # of what was read, by its name
        gone = repo.catalog.dropped().parts
        for name, commit in repo.revisions.visible().items():
            if name not in gone:
                self.add(name, commit)

    def add(self, name: ObjectId, commit: Commit) -> None:
        """Know a commit; of several with the same content one that is exact."""
        files = [file for file in commit.files if file.skeleton is not None]
        hashes = {file.path: file.hash for file in files if file.hash is not None}
        if len(hashes) < len(files):  # some never were files
            return
        content = _content(commit.source, hashes)
        if content not in self._commits or self._repo.entry(name).exact:
            self._commits[content] = name
        self._sizes.add(commit.raw_bytes)
        if commit.source == "directory":
            for file in files:
                self._members.setdefault((file.path, str(file.hash)), set()).add(name)
                self._member_sizes.add((file.path, file.size))

    def forget(self, name: str) -> None:
        """A file or directory of this name is not what it was."""
        self._content.pop(name, None)

    def find(self, found: Found, progress: Progress) -> ObjectId | None:
        """The commit that holds what is in a file or directory; read only if one may.

        Of files that make a checkpoint together some may be gone by now: a commit that holds the
        others holds them all.
        """
        is_left = self._may_be_left(found)
        if found.size_bytes not in self._sizes and not is_left:
            return None
        if found.name not in self._content:
            self._content[found.name] = _content(found.kind, dict(self._hashes(found)))
            progress(found.size_bytes)
        content = self._content[found.name]
        known = self._commits.get(content)
        return self._holder(found, content) if known is None and is_left else known

    def _may_be_left(self, found: Found) -> bool:
        """Whether it may be what is left of files that were committed together."""
        if not found.files:
            size = (found.name, found.size_bytes)
            return found.kind == "file" and is_member(found.name) and size in self._member_sizes
        with contextlib.suppress(OSError):
            sizes = {(name, (found.path / name).stat().st_size) for name in found.files}
            return sizes <= self._member_sizes
        return False

    def _holder(self, found: Found, content: Content) -> ObjectId | None:
        """The commit of a directory that holds some files; one that is exact, if there is any."""
        pairs = {(found.name, content)} if isinstance(content, str) else content
        having = set.intersection(*(self._members.get(pair, set()) for pair in pairs))
        return min(having, key=lambda name: (not self._repo.entry(name).exact, name), default=None)

    def _hashes(self, found: Found) -> Iterator[tuple[str, str]]:
        skip = real_path(self._repo.folder)
        checkpoint = open_checkpoint(found.path, skip=skip, only=found.files)
        below = found.kind == "directory"
        for file in checkpoint.files:
            path = found.path / file.path if below else found.path
            try:
                yield file.path, hash_file(path)
            except OSError as error:
                raise unreadable(path, error) from error
        checkpoint.check_unchanged()


def _content(kind: str, hashes: Mapping[str, str]) -> Content:
    return frozenset(hashes.items()) if kind == "directory" else next(iter(hashes.values()))
