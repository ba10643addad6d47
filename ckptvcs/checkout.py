"""Checkout: a commit -> files in the working directory, without losing what is there.

A file that stands where a checkout writes is overwritten only if its bytes can be had again: its
hash is that of a file of a commit that can be restored exactly, or it was written by a checkout.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ckptvcs.errors import CkptError, ConflictError, InvalidInputError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import FileEntry
from ckptvcs.history.marking import mark
from ckptvcs.history.schema import Op
from ckptvcs.restore import Restorer, safe_path
from ckptvcs.source import Progress
from ckptvcs.store.object import ObjectId

_BLOCK = 1 << 22
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True)
class CheckedOut:
    """What a checkout wrote, and how true it is."""

    paths: tuple[Path, ...]
    fidelity: dict[str, str]
    exact: bool


def hash_file(path: Path) -> str:
    """BLAKE3 of a file's bytes."""
    digest = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class WorkTree:
    """The files outside the store.  `written` remembers the hashes of files that checkouts wrote
    in near form, which no commit lists.
    """

    def __init__(self, catalog: Catalog, root: Path, written: Path) -> None:
        self._catalog, self._root, self._written = catalog, root, written

    def home(self, path: str, *, inside: bool) -> Path:
        """Where a committed path belongs: below the repository's folder if it came from there."""
        return (self._root if inside else Path.cwd()) / path

    def can_be_had_again(self, path: Path) -> bool:
        """Whether the bytes of a file are stored exactly, or came from a checkout."""
        return self._is_there(hash_file(path))

    def _is_there(self, digest: str) -> bool:
        if (self._written / digest).exists():
            return True
        return any(self._is_safe(name, digest) for name in self._originals(digest))

    def _originals(self, digest: str) -> list[ObjectId]:
        """The commits of a file with this hash."""
        return self._catalog.store.find(b"file:" + digest.encode())

    def _is_safe(self, name: ObjectId, digest: str) -> bool:
        """Whether a commit holds a file exactly, by the bytes of its packs: what is about to be
        overwritten may be the only other copy.
        """
        store, gone = self._catalog.store, self._catalog.dropped()
        with contextlib.suppress(CkptError, FileNotFoundError):
            restorer = Restorer(self._catalog, name)
            if not restorer.exact:  # beside weights that are near a file may have none
                return any(
                    file.hash == digest and self._is_exact(restorer, file)
                    and restorer.digest(file) == digest
                    for file in restorer.commit.files
                )  # fmt: skip
            marked = mark(self._catalog, {name: self._catalog.commit(name)}, gone)
            places = [store.places(one)[0] for one in marked.objects]
            for pack, folder in {place.pack: place.folder for place in places}.items():
                store.verify_pack(pack, folder)
            return True
        return False

    def _is_exact(self, restorer: Restorer, file: FileEntry) -> bool:
        """Whether no tensor of a file is near."""
        if file.skeleton is None:
            return False
        segments = self._catalog.skeleton(file.skeleton).walk(restorer.schema)
        tensors = (restorer.schema.tensors[at] for op, at, _ in segments if op == Op.TENSOR)
        return all(restorer.fidelity.get(info.part) == "exact" for info in tensors)

    def _remember(self, digest: str) -> None:
        try:
            self._written.mkdir(parents=True, exist_ok=True)
            (self._written / digest).touch()
            known = sorted(self._written.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for path in known[:-_MAX_REMEMBERED]:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # a later checkout then asks for --force, which is safe

    def _is_near_form(self, path: Path, restorer: Restorer, file: FileEntry) -> bool:
        """Whether a file is what this commit restores to, though nothing remembers writing it."""
        if restorer.exact or path.stat().st_size != file.size:
            return False
        return restorer.digest(file) == hash_file(path)

    def _guard(self, target: Path, restorer: Restorer, file: FileEntry) -> None:
        if target.is_dir() and not target.is_symlink():
            raise InvalidInputError(
                f"{target} is a directory", hint="name the file to write: -o PATH"
            )
        if not target.exists() or self._is_there(digest := hash_file(target)):
            return
        if not self._is_near_form(target, restorer, file):
            raise self._refusal(target, digest)

    def _refusal(self, target: Path, digest: str) -> ConflictError:
        """What would be lost with a file."""
        commits = {name: self._catalog.commit(name) for name in self._originals(digest)}
        if not commits:
            return ConflictError(
                f"{target} holds changes that are in no commit exactly",
                hint="commit it first, write elsewhere with -o, or overwrite it with --force",
            )
        name = max(commits, key=lambda one: commits[one].time)
        article = "an" if commits[name].source == "directory" else "the"
        return ConflictError(
            f"{target} is {article} original of commit {name[:8]}, {self._state(name)}: "
            "it is the last exact copy",
            hint="write elsewhere with -o, commit it again to keep it exactly, or overwrite it "
            "with --force",
        )

    def _state(self, name: ObjectId) -> str:
        """Why a commit does not hold its files exactly."""
        gone = self._catalog.dropped()
        if name in gone.commits:
            return "which was dropped"
        if name in gone.parts:
            return f"whose {' and '.join(sorted(gone.parts[name]))} part was dropped"
        with contextlib.suppress(CkptError):
            if not Restorer(self._catalog, name).exact:
                return "which is only near now"
        return "whose exact form is damaged"

    def write(
        self, restorer: Restorer, output: Path | None, progress: Progress, *, force: bool
    ) -> CheckedOut:
        """Write the files of a commit.

        Raises:
            ConflictError: a file would be overwritten whose bytes are nowhere else.
            CorruptionError: something does not have its hash; nothing was replaced by it.
        """
        commit = restorer.commit
        target = output
        if target is None:
            if commit.path != ".":
                safe_path(commit.path)
            target = self.home(commit.path, inside=commit.inside)
        files = [file for file in commit.files if file.skeleton is not None]
        if commit.source == "directory":
            if target.exists() and not target.is_dir():
                raise InvalidInputError(f"{target} is a file, the commit is a directory")
            pairs = [(file, target / safe_path(file.path)) for file in files]
        else:
            pairs = [(files[0], target)]
        if not force:
            for file, path in pairs:
                self._guard(path, restorer, file)
        digests = self._save(restorer, files, target, progress)
        if not restorer.exact or commit.source == "state":
            for file, digest in zip(files, digests, strict=True):
                if digest != file.hash:
                    self._remember(digest)
        return CheckedOut(tuple(path for _, path in pairs), dict(restorer.fidelity), restorer.exact)

    def _save(
        self, restorer: Restorer, files: list[FileEntry], target: Path, progress: Progress
    ) -> list[str]:
        if restorer.commit.source == "directory":
            return restorer.save_directory(target, progress)
        return [restorer.save(files[0], target, progress)]

    def changes(self, restorer: Restorer) -> list[tuple[str, Path]]:
        """How the files of a commit differ from those in their places: `missing`, `changed` or
        `near` (written by a checkout of a near commit), with the path.
        """
        commit = restorer.commit
        home = self.home(commit.path, inside=commit.inside)
        found = []
        for file in commit.files:
            if file.hash is None:
                continue
            path = home / safe_path(file.path) if commit.source == "directory" else home
            if not path.is_file():
                found.append(("missing", path))
                continue
            if path.stat().st_size == file.size and (digest := hash_file(path)) != file.hash:
                kind = "near" if (self._written / digest).exists() else "changed"
                found.append((kind, path))
            elif path.stat().st_size != file.size:
                found.append(("changed", path))
        return found
