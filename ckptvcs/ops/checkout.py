"""Checkout: a commit -> files in the working directory, without losing existing files.

Without `force`, a checkout overwrites a file only if the repository can restore its bytes: either
an exact commit contains the file, or an earlier checkout wrote it.  A file that another program
creates or saves after this check is kept.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.file_writer import (
    Looks,
    look_at_files,
    named_paths,
    require_links,
    save_directory,
    save_file,
)
from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import CkptError, ConflictError, InvalidInputError
from ckptvcs.files.names import refuse_trusted, safe_path
from ckptvcs.files.placing import Folder, NotRegularError, Seen
from ckptvcs.files.targets import Target, Targets, looked, writing
from ckptvcs.hashing import hasher
from ckptvcs.history.commit import INEXACT, Commit, FileEntry
from ckptvcs.history.reachability import mark
from ckptvcs.history.schema import Op
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.ids import ObjectId

_BLOCK = 1 << 22
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True)
class CheckedOut:
    """The result of a checkout.

    Attributes:
        paths: The written files.
        fidelity: For each part its form: `exact`, `near` or `dropped`.
        exact: Whether the files are exactly the committed ones.
    """

    paths: tuple[Path, ...]
    fidelity: dict[str, str]
    exact: bool


def hash_file(path: Path) -> str:
    """Return the BLAKE3 hash of a file."""
    with path.open("rb") as file:
        return _hash(file)


def _hash(file: BinaryIO) -> str:
    digest = hasher(threads=True)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _only(commit: Commit) -> FileEntry:
    """Return the file of a commit of a `file` or a `state`."""
    return next(file for file in commit.files if file.skeleton is not None)


_REFUSED = {"exact": INEXACT, "near": INEXACT - {"near"}}
"""The forms that each value of `require` refuses."""


def checkout_files(
    repository: Repository,
    name: ObjectId,
    output: Path | None,
    progress: Progress = quiet,
    announce: Callable[[Path], object] = quiet,
    *,
    force: bool = False,
    require: str | None = None,
    near: bool = False,
) -> CheckedOut:
    """Write the files of a commit; see `Repo.checkout_files`."""
    tree = WorkTree(repository)
    if near and output is None:
        raise InvalidInputError(
            "a near form is written as a copy", hint="name the output: -o near.pt"
        )

    def write() -> CheckedOut:
        restorer = _reader(repository, name, require=require, near=near)
        return tree.write(restorer, output, progress, announce, force=force)

    return repository.read_again(write)


def checkout_part(
    repository: Repository,
    name: ObjectId,
    part: str,
    output: Path | None,
    announce: Callable[[Path], object],
    *,
    force: bool,
    require: str | None,
) -> CheckedOut:
    """Write one part of a commit; see `Repo.checkout_part`."""
    with Targets() as looks:
        target = _part_target(repository, repository.catalog.commit(name), part, output, looks)
        if target.is_folder:
            raise InvalidInputError(f"{target.path} is a directory", hint="name the file to write")
        if target.seen is not None and not force:
            raise ConflictError(f"{target.path} exists", hint="overwrite it with --force")
        if output is None:
            if not force:
                refuse_trusted([repository.catalog.commit(name).path])
            announce(target.path)
        form = save_part(repository, name, part, target, require=require)
        return CheckedOut((target.path,), {part: form}, form == "exact")


def _part_target(
    repository: Repository, commit: Commit, part: str, output: Path | None, looks: Targets
) -> Target:
    """Return the target of a part: `output`, or a file beside the recorded path of the commit."""
    if output is not None:
        return looks.look(output)
    top, below = WorkTree(repository).home(commit)
    home = top / below
    stem = home.stem if commit.source != "directory" else home.name or "checkpoint"
    if below.parts:
        return looks.below(top, below.with_name(f"{stem}.{part}.pt"))
    return looks.look(home.with_name(f"{stem}.{part}.pt"))


def save_part(
    repository: Repository,
    name: ObjectId,
    part: str,
    target: Path | Target,
    *,
    require: str | None = None,
) -> str:
    """Write one part of a commit as .safetensors or as a torch.save file; return its fidelity.

    Raises:
        ConflictError: the part is not what `require` names, or another program created or changed
            the target meanwhile.
    """

    def save() -> str:
        restorer = _reader(repository, name, part, require=require)
        PartReader(restorer).save(part, at)
        return restorer.fidelity.get(part, "exact")  # a part of small tensors is always exact

    with looked(target) as at:
        return repository.read_again(save)


def _reader(
    repository: Repository,
    name: ObjectId,
    part: str | None = None,
    *,
    require: str | None,
    near: bool = False,
) -> Restorer:
    """Return a reader of a commit, or of its near form.

    Raises:
        ConflictError: `require` is `exact` or `near`, and a part is in a form that is farther off.
        InvalidInputError: `require` has another value, or is `exact` with `near` set, or the commit
            has no near form.
    """
    if require not in (None, *_REFUSED):
        raise InvalidInputError(f"invalid form '{require}'", hint="write exact or near")
    if require == "exact" and near:
        raise InvalidInputError(
            "a near form cannot be required to be exact", hint="leave out one of the options"
        )
    restorer = repository.restorer(name, near=near)
    forms = {form for key, form in restorer.fidelity.items() if part in (None, key)}
    for form in sorted(forms & _REFUSED[require] if require else ()):
        raise ConflictError(
            f"commit {name[:8]} can only be restored in {form} form",
            hint=f"leave out --require {require} to restore the {form} form",
        )
    if near and not forms & INEXACT:
        raise InvalidInputError(
            f"commit {name[:8]} has no near form: its codec is exact", hint="leave out --near"
        )
    return restorer


class WorkTree:
    """The files outside the store.

    The folder `written` records the hashes of files that checkouts wrote in near form, since no
    commit contains these hashes.
    """

    def __init__(self, repository: Repository) -> None:
        self._catalog, self._root = repository.catalog, repository.root
        self._written = repository.cache / "written"

    def home(self, commit: Commit) -> tuple[Path, PurePosixPath]:
        """Return the base folder of a commit, and the recorded path below it.

        The path may come from a foreign repository, so it is checked.

        Raises:
            CorruptionError: The path leaves the folder.
        """
        top = self._root if commit.inside else Path.cwd()
        return top, PurePosixPath() if commit.path == "." else safe_path(commit.path)

    def _is_recoverable(self, digest: str) -> bool:
        """Return whether a commit has a file of this hash exactly, or a checkout wrote one."""
        return (self._written / digest).exists() or any(
            self._is_safe(name, digest) for name in self._commits_of(digest)
        )

    def _commits_of(self, digest: str) -> list[ObjectId]:
        """Return the commits that contain a file with this hash."""
        return self._catalog.store.find(b"file:" + digest.encode())

    def _is_safe(self, name: ObjectId, digest: str) -> bool:
        """Return whether a commit can restore a file exactly.

        The file that a checkout overwrites may be the only other copy, so this reads the packs.
        """
        store, dropped = self._catalog.store, self._catalog.dropped()
        with contextlib.suppress(CkptError, FileNotFoundError):
            restorer = Restorer(self._catalog, name)
            if not restorer.exact:  # a file without near tensors may still be exact
                return any(
                    file.hash == digest
                    and self._is_exact(restorer, file)
                    and restorer.digest(file) == digest
                    for file in restorer.commit.files
                )
            marked = mark(self._catalog, {name: self._catalog.commit(name)}, dropped)
            places = [store.places(object_id)[0] for object_id in marked.objects]
            for pack, folder in {place.pack: place.folder for place in places}.items():
                store.verify_pack(pack, folder)
            return True
        return False

    def _is_exact(self, restorer: Restorer, file: FileEntry) -> bool:
        """Return whether every tensor of a file is exact."""
        if file.skeleton is None:
            return False
        segments = self._catalog.skeleton(file.skeleton).walk(restorer.schema)
        tensors = (restorer.schema.tensors[at] for op, at, _ in segments if op == Op.TENSOR)
        return all(restorer.fidelity.get(info.part) == "exact" for info in tensors)

    def _remember(self, digest: str) -> None:
        try:
            self._written.mkdir(parents=True, exist_ok=True)
            (self._written / digest).touch()
            notes = sorted(self._written.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for path in notes[:-_MAX_REMEMBERED]:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # a later checkout then requires --force, which is safe

    def _guard(
        self, folder: Folder, name: str, seen: Seen, restorer: Restorer, file: FileEntry
    ) -> None:
        """Raise ConflictError if the repository cannot restore the existing file `name`."""
        path = folder.path / name
        if stat.S_ISDIR(seen.st_mode):
            raise InvalidInputError(
                f"{path} is a directory", hint="name the file to write: -o PATH"
            )
        try:
            with folder.open_file(name, follow=True) as existing:
                size, digest = os.fstat(existing.fileno()).st_size, _hash(existing)
        except FileNotFoundError:
            raise ConflictError(
                f"{path} is a symbolic link to nothing",
                hint="write elsewhere with -o, or overwrite it with --force",
            ) from None
        except NotRegularError:
            raise ConflictError(
                f"{path} is not a regular file", hint="write elsewhere with -o"
            ) from None
        if self._is_recoverable(digest):
            return
        # The file may be the near form of this very commit, although no note of it is left.
        if restorer.exact or size != file.size or restorer.digest(file) != digest:
            raise self._refusal(path, digest)

    def _refusal(self, target: Path, digest: str) -> ConflictError:
        """Return the error that says which content a checkout would destroy."""
        commits = {name: self._catalog.commit(name) for name in self._commits_of(digest)}
        if not commits:
            return ConflictError(
                f"{target} has changes that no commit contains exactly",
                hint="commit it first, write elsewhere with -o, or overwrite it with --force",
            )
        name = max(commits, key=lambda name: commits[name].time)
        article = "an" if commits[name].source == "directory" else "the"
        return ConflictError(
            f"{target} is {article} original of commit {name[:8]}, {self._state(name)}: "
            "it is the last exact copy",
            hint="write elsewhere with -o, commit it again to keep it exactly, or overwrite it "
            "with --force",
        )

    def _state(self, name: ObjectId) -> str:
        """Return the reason why a commit cannot restore its files exactly."""
        dropped = self._catalog.dropped()
        if name in dropped.commits:
            return "which was dropped"
        if name in dropped.parts:
            return f"whose {' and '.join(sorted(dropped.parts[name]))} part was dropped"
        with contextlib.suppress(CkptError):
            if not Restorer(self._catalog, name).exact:
                return "which is only near now"
        return "whose exact form is damaged"

    def write(
        self,
        restorer: Restorer,
        output: Path | None,
        progress: Progress,
        announce: Callable[[Path], object],
        *,
        force: bool,
    ) -> CheckedOut:
        """Write the files of a commit; see `Repo.checkout_files`."""
        commit = restorer.commit
        files = [file for file in commit.files if file.skeleton is not None]
        with Targets() as targets:
            if output is not None:
                target = targets.look(output)
            else:
                target = targets.below(*self.home(commit))
            if not force:
                refuse_trusted(named_paths(commit, own=output is None))
            looks = look_at_files(commit, target) if commit.source == "directory" else {}
            if not force:
                self._guard_all(restorer, target, looks)
            announce(target.path)
            digests = (
                save_directory(restorer, target, looks, progress)
                if commit.source == "directory"
                else [save_file(restorer, target, progress)]
            )
        if not restorer.exact or commit.source == "state":
            for file, digest in zip(files, digests, strict=True):
                if digest != file.hash:
                    self._remember(digest)
        paths: tuple[Path, ...] = (target.path,)
        if commit.source == "directory":
            paths = tuple(target.path / file.path for file in files)
        return CheckedOut(paths, dict(restorer.fidelity), restorer.exact)

    def _guard_all(self, restorer: Restorer, target: Target, looks: Looks) -> None:
        commit = restorer.commit
        with writing(target.path):
            if commit.source != "directory":
                if target.seen is not None:
                    self._guard(target.folder, target.name, target.seen, restorer, _only(commit))
            elif target.is_folder:
                require_links(commit, looks, target.path.joinpath)
                with target.existing() as folder:
                    for file in commit.files:
                        path, seen = safe_path(file.path), looks.get(file.path)
                        if file.skeleton is not None and seen is not None:
                            with folder.inside(path.parent) as parent:
                                self._guard(parent, path.name, seen, restorer, file)
