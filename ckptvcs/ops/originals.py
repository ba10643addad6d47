"""Delete the original files of a checkpoint, if the repository can restore them.

find      find the commit that contains a file or a directory byte for byte (`Contents`)
reach     check that a ref reaches the commit; read the refs from disk, not from memory
pin       pin the commit, if it is exact only through an exact patch that may expire
wait      wait for processes that may delete that patch and looked for pins before this one
verify    restore the commit, and compare each original with its committed hash
settle    make the ref, the pin and all packs that the commit depends on durable
delete    while no other process can move a ref: check the ref and the pin again, then delete

docs/format.md, "Deletions", explains why the order matters; tests/system/test_interleavings.py
tests every order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

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
        keep_reason: Why files were kept; None if all were deleted.
        pinned: Whether the commit was pinned, so that its exact form is kept.
        error: The error that kept the files, if there was one.
    """

    removed: list[Removed] = field(default_factory=list)
    keep_reason: str | None = None
    pinned: bool = False
    error: CkptError | None = None


class Remove(Protocol):
    """Deletes the originals of one commit; see `Keeper.remove`."""

    def __call__(self, name: ObjectId, top: str, done: Removal | None = None) -> Removal: ...


class Keeper:
    """Verifies commits of one repository, and deletes originals that it can restore."""

    def __init__(self, repo: Repository, codec: str | None) -> None:
        """`codec` is the codec of new commits; None is the configured one.

        Raises:
            InvalidInputError: The codec does not exist.
        """
        self._repo, self._codec = repo, codec
        repo.config.codec_of(codec)
        self._lines: dict[ObjectId, Set[ObjectId]] = {}
        self._last = HEAD  # the ref that reached the last commit; it may reach the next one

    @contextmanager
    def removing(
        self, folder: Path, *, accept_near: bool, progress: Progress = quiet
    ) -> Iterator[Remove]:
        """Yield `remove` for the originals in a folder.

        Meanwhile gc cannot delete; what it dropped before is reloaded.

        Args:
            folder: The folder of the originals.
            accept_near: Also delete originals whose commit is only near.
            progress: Called with the number of bytes that were hashed since its last call.

        Raises:
            BusyError: gc is deleting.
        """
        catalog = self._repo.catalog
        with lease(catalog.store.backend) as self._lease:
            catalog.reload()
            with Originals(folder) as self._originals:
                self._accept_near, self._progress = accept_near, progress
                yield self.remove

    def is_exact(self, name: ObjectId, progress: Progress = quiet) -> bool:
        """Restore a commit in its present form, without writing; return whether that is exact.

        If exact, each file must have its committed hash.  If near, each tensor must have its
        recorded hash, each file must open in its format, and the relative error of the weights must
        be within the configured bound.

        The cached weights of the commit itself are not used: they were cached during encoding, and
        do not show that their frames can be read.  Those of its parent are used, against their
        hashes, so that verifying one commit after another reads each frame once.

        Raises:
            CorruptionError: A check failed.
            NotFoundError: The commit, or a part of it, was dropped.
        """
        decoded = _of_parent(self._repo, name)
        restorer = Restorer(self._repo.catalog, name, cache=self._repo.bases, decoded=decoded.get)
        for file in restorer.commit.files:
            safe_path(file.path)  # a checkout refuses paths that leave its target
            if file.skeleton is None:
                continue
            digest = restorer.write_file(file, lambda _: None, progress)
            if restorer.exact and digest != file.hash:
                raise CorruptionError(f"{file.path} is not restored bit for bit")
            layout, numbers = restorer.layout(file)
            if layout.format != file.format or -1 in numbers:
                raise CorruptionError(f"{file.path} is not restored as a {file.format} file")
        error, bound = restorer.commit.error.weight_rel, self._bound(restorer.commit.codec)
        archived = "archived" in restorer.fidelity.values()  # the bound on its lag holds
        if not restorer.exact and not archived and bound and not error <= bound:
            raise CorruptionError(f"weights are off by {error:.2g}, more than {bound:.2g}")
        return restorer.exact

    def _bound(self, codec: str) -> float:
        """Return the configured error bound of weights that `codec` encoded; 0 for no bound."""
        config = self._repo.commit_config()
        try:
            current = config.codec_of(self._codec)
            spec = current if codec == current.name else config.codec_of(codec)
        except InvalidInputError:  # a codec of a newer version, or without bounds
            return 0.0
        return spec.settings.max_weight_error if isinstance(spec.settings, NearSpec) else 0.0

    def why_kept(self, name: ObjectId, *, accept_near: bool) -> str | None:
        """Return why the originals of a commit cannot be deleted, without reading them.

        None means that nothing is known to prevent it.
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
        form = "archived" if entry.near_error else "near"
        return f"its commit is only {form} ({off})"

    def remove(self, name: ObjectId, top: str, done: Removal | None = None) -> Removal:
        """Delete the originals of a commit; `removing` yields this method.

        The commit is restored once more in its present form, and each file is hashed once more.
        Files that differ from the commit stay, and so do all files if no ref reaches the commit.
        If the commit is exact only through an exact patch, it is pinned first, unless near is
        accepted: the patch could expire later.

        `top` is the file or directory, empty for several files of the folder.  `done` is updated
        with each deletion and returned, so that it is true after an interruption.
        """
        done = Removal() if done is None else done
        done.keep_reason = self.why_kept(name, accept_near=self._accept_near)
        if done.keep_reason is None:
            try:
                self._remove(name, PurePosixPath(top), done)
            except CkptError as error:
                done.keep_reason, done.error = error.message, error
        return done

    def _remove(self, name: ObjectId, top: PurePosixPath, done: Removal) -> None:
        commit, originals = self._repo.catalog.commit(name), self._originals
        files = list(_source_files(commit, top))
        for path, size, _ in files:
            originals.check(path, size)
        ref = self._reaching_ref(name, None)
        pin = f"pins/{name}" if _patched(commit) and not self._accept_near else None
        done.pinned = pin is not None and set_pin(self._repo, name, pinned=True)
        try:
            if pin is not None:
                self._await_deletions(commit)
            if not self.is_exact(name) and not self._accept_near:
                raise ConflictError("its exact patch expired: the commit is only near now")
            proven = [originals.prove(path, digest, self._progress) for path, _, digest in files]
            self._settle(name, commit, [ref] if pin is None else [ref, pin])
            self._delete(name, ref, pin, proven, done)
        finally:
            if done.pinned and not done.removed:
                done.pinned = not set_pin(self._repo, name, pinned=False)
        if (
            commit.source == "directory"
            and top.name
            and not _remove_folders(commit, top, originals)
        ):
            done.keep_reason = "its directory contains files that are not committed, or links"

    def _reaching_ref(self, name: ObjectId, excluded: str | None) -> str:
        """Return a ref that reaches a commit now, other than `excluded`.

        Raises:
            ConflictError: No ref reaches it, or the commit was dropped.
        """
        if name in self._repo.catalog.dropped().commits:
            raise ConflictError(_DROPPED)
        revisions = self._repo.revisions
        for refs in ([self._last], revisions.tips()):
            for ref in refs:
                if ref != excluded and revisions.leads(ref, name, self._lines):
                    self._last = ref
                    return ref
        raise ConflictError("no ref reaches its commit any more")

    def _await_deletions(self, commit: Commit) -> None:
        """Wait for processes that may still delete an exact patch of a commit.

        They looked for pins before this process pinned the commit.

        Raises:
            ConflictError: They do not end.
        """
        catalog = self._repo.catalog
        backend = catalog.store.backend
        others = [held for held in live_leases(backend) if held != self._lease]
        if not others:  # a process that deletes patches holds a lease
            return
        catalog.reload()
        exact = [part.exact for part in commit.parts.values() if part.exact is not None]
        if any(map(catalog.is_fading, exact)) and not await_others(backend, others):
            raise ConflictError("another process may delete its exact patch", hint=_AGAIN)

    def _settle(self, name: ObjectId, commit: Commit, refs: list[str]) -> None:
        """Make durable everything that the commit depends on, whichever process wrote it."""
        catalog = self._repo.catalog
        marked = mark(catalog, {name: commit}, catalog.dropped())
        require_packs(catalog, marked, durable=True)
        catalog.store.backend.settle(["format"])
        for ref in refs:
            self._repo.refs.settle(ref)

    def _delete(
        self, name: ObjectId, ref: str, pin: str | None, proven: list[Proven], done: Removal
    ) -> None:
        """Delete files while no other process can undo the commit or its pin.

        Raises:
            ConflictError: Another process did so before, or changed a file.
        """
        backend = self._repo.catalog.store.backend
        with turn(backend):
            check_lease(backend, self._lease)
            self._repo.catalog.forget_drops()
            current = self._reaching_ref(name, pin if done.pinned else None)
            if pin is not None and self._repo.refs.target(pin) is None:
                raise ConflictError("its commit was unpinned")
            if current != ref:
                self._repo.refs.settle(current)
            backend.settle_seen()
            for file in proven:
                try:
                    done.removed.append(self._originals.delete(file))
                except (KeyboardInterrupt, SystemExit):
                    listed = {removed.path for removed in done.removed}
                    if file.path not in listed and not self._originals.has(file.path):
                        done.removed.append(file.removed)
                    raise


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


def _of_parent(repo: Repository, name: ObjectId) -> dict[ObjectId, DecodedTable | None]:
    """Return the cached weights of a commit's parent, if any."""
    catalog, commit = repo.catalog, repo.catalog.commit(name)
    model = commit.parts.get("model")
    for parent in commit.parents[:1]:
        with contextlib.suppress(MissingObjectError):  # gc may have deleted it
            base = catalog.commit(parent)
            state, schema = base.parts.get("model"), catalog.schema(base.schema)
            if state is not None and (model is None or state.values != model.values):
                infos = [schema.tensors[number] for number in schema.stored("model")]
                return {state.values: find_decoded(catalog, repo.bases, None, state.values, infos)}
    return {}


Content = str | frozenset[tuple[str, str]]
"""The hash of a file, or the paths and hashes of the files of a directory."""


class Contents:
    """Finds the commit with a given content, among those without dropped parts."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._commits: dict[Content, ObjectId] = {}
        self._members: dict[tuple[str, str], set[ObjectId]] = {}  # by path and hash; of directories
        self._member_sizes: set[tuple[str, int]] = set()
        self._sizes: set[int] = set()
        self._content: dict[str, Content] = {}  # of the hashed checkpoints, by name
        dropped = repo.catalog.dropped().parts
        for name, commit in repo.revisions.visible().items():
            if name not in dropped:
                self.add(name, commit)

    def add(self, name: ObjectId, commit: Commit) -> None:
        """Add a commit; among several with the same content, an exact one is preferred."""
        files = [file for file in commit.files if file.skeleton is not None]
        hashes = {file.path: file.hash for file in files if file.hash is not None}
        if len(hashes) < len(files):  # some were never files
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
        """Forget the content of a file or directory that changed."""
        self._content.pop(name, None)

    def find(self, found: Found, progress: Progress = quiet) -> ObjectId | None:
        """Return the commit that contains a checkpoint, or None.

        A file is hashed only if its size matches a commit.  If only some files of a checkpoint are
        left, a commit that contains those contains them all.
        """
        is_left = self._may_be_left(found)
        if found.size_bytes not in self._sizes and not is_left:
            return None
        if found.name not in self._content:
            self._content[found.name] = _content(found.kind, dict(self._hashes(found)))
            progress(found.size_bytes)
        content = self._content[found.name]
        commit = self._commits.get(content)
        return self._directory_with(found, content) if commit is None and is_left else commit

    def _may_be_left(self, found: Found) -> bool:
        """Return whether the files may be the rest of a directory that was committed."""
        if not found.files:
            size = (found.name, found.size_bytes)
            return found.kind == "file" and is_member(found.name) and size in self._member_sizes
        with contextlib.suppress(OSError):
            sizes = {(name, (found.path / name).stat().st_size) for name in found.files}
            return sizes <= self._member_sizes
        return False

    def _directory_with(self, found: Found, content: Content) -> ObjectId | None:
        """Return the commit of a directory with these files, preferably an exact one."""
        pairs = {(found.name, content)} if isinstance(content, str) else content
        commits = set.intersection(*(self._members.get(pair, set()) for pair in pairs))
        return min(commits, key=lambda name: (not self._repo.entry(name).exact, name), default=None)

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
