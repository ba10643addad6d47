"""Content: which commit holds, byte for byte, what is in a file or a directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from ckptvcs.checkpoint.grouping import is_member
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.survey import Found
from ckptvcs.history.commit import Commit
from ckptvcs.ops.checkout import hash_file
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import ObjectId

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
