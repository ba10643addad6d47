"""Refs: numbered write-once files; publishing the next number is the only commit point.

    refs/heads/<name>/<generation>     branches
    refs/tags/<name>/<generation>      tags
    refs/pins/<id>/<generation>        pins: commits that keep their exact form
    refs/HEAD/<generation>             HEAD: a branch, or a commit

Each version (a field `generation` on disk) holds the hash of the version it was computed from.  Of
two writers of the same number one publishes it and the other gets a ConflictError.  Versions are
never overwritten or deleted: the older ones are the reflog.  No other version holds the hash of the
newest one, so the cache has a backup copy of it, which shows its loss.
Layout: docs/format.md, "Refs".
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from urllib.parse import quote, unquote

from ckptvcs.errors import CkptError, ConflictError, CorruptionError, InvalidInputError
from ckptvcs.hashing import hex_hash
from ckptvcs.history.canonical_json import Json, load, seal, unseal
from ckptvcs.history.fields import FLAG, ID, NATURAL, TEXT, Fields, nullable, optional
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.ids import ObjectId

HEAD = "HEAD"
_MAX_REF_BYTES = 1 << 16
_OLD = frozenset(  # fields of versions without a check
    ("ref", "generation", "previous", "commit", "branch", "time", "action", "nonce")
)
_LAST = 10**16 - 1
_MOST = 10**9  # plausible versions of a ref
_GENERATION = re.compile(r"[0-9]{16}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}\Z")
_MAX_FILE_NAME = 255
LATEST_GOOD = "latest-good"
"""The revision of the newest commit that proves itself; `ops/resume.py` finds it."""

_RESERVED = frozenset({"HEAD", "latest", LATEST_GOOD})


@dataclass(frozen=True)
class Generation:
    """One version of a ref.

    Attributes:
        number: The number of the version, from 1.
        hash: The hash of its bytes, as the next version records it; None if that is unknown.
        previous: The hash of the version from which this one was computed.
        commit: The id of the commit; None if the ref is deleted, has no commits, or is HEAD on a
            branch.
        branch: The branch that HEAD follows; None for other refs and a detached HEAD.
        time: The time of the change, ISO 8601 in UTC.
        action: The name of the operation.
        is_lost: Whether it replaces a version that a repair could not recover.
    """

    number: int
    hash: str | None
    previous: str | None
    commit: ObjectId | None
    branch: str | None
    time: str
    action: str
    is_lost: bool = False


_VERSION = Fields(
    lambda *values: values,
    ref=TEXT,
    generation=NATURAL,
    previous=nullable(TEXT),
    commit=nullable(ID),
    branch=nullable(TEXT),
    time=TEXT,
    action=TEXT,
    is_lost=optional(FLAG),
    lost=optional(TEXT),
)


@dataclass(frozen=True)
class Move:
    """A planned move of a branch from `old` to a commit.

    If `takes_head`, HEAD moves too, from `head` to the branch.
    """

    commit: ObjectId
    branch: str
    old: Generation | None
    head: Generation | None
    takes_head: bool
    time: str


def check_name(name: str, what: str) -> str:
    """Return `name` if a branch or a tag may have it.  Raises InvalidInputError."""
    numeric = name.isdigit() or name.startswith("id:") or name in _RESERVED
    if numeric or not _fits(name) or ".." in name or name.endswith((".", "/")):
        raise InvalidInputError(
            f"'{name}' cannot name a {what}",
            hint="use letters, digits and _ . + / -; digits alone are a step",
        )
    return name


def _quoted(name: str) -> str:
    return "".join(f"%{ord(c):02X}" if c.isupper() else quote(c, safe="+") for c in name)


def _fits(name: str) -> bool:
    return bool(_NAME.match(name)) and len(_quoted(name)) <= _MAX_FILE_NAME


def _folder(ref: str) -> str:
    """Return the folder of a ref.  Upper case is escaped: some file systems ignore case."""
    if ref == HEAD:
        return "refs/HEAD"
    space, _, name = ref.partition("/")
    return f"refs/{space}/{_quoted(name)}"


def _file(ref: str, number: int) -> str:
    return f"{_folder(ref)}/{number:016}"


def _backup(ref: str) -> str:
    return f"cache/{_folder(ref)}"


def follows(move: Generation, below: Generation | None) -> bool:
    """Return whether a version was computed from the one before it, as far as their hashes tell."""
    expected = below.hash if below else None
    return move.previous == expected or (below is not None and expected is None)


def _can_be(ref: str) -> bool:
    """Return whether a ref may have this name: its folder must not be outside its space."""
    name = ref.partition("/")[2]
    return ref == HEAD or (_fits(name) and ".." not in name)


def _dump_version(ref: str, number: int, **fields: Json) -> bytes:
    nullable_fields = dict.fromkeys(("previous", "commit", "branch"))
    nonce = os.urandom(8).hex()
    return seal({"ref": ref, "generation": number, "nonce": nonce} | nullable_fields | fields)


class Refs:
    """The refs of one repository.  A ref is `HEAD`, `heads/NAME`, `tags/NAME` or `pins/ID`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._seen: dict[str, int] = {}

    def _newest(self, ref: str) -> int:
        """Return the number of the newest version, 0 if the ref has none.

        Numbers have no gaps.  The search starts at the last number seen, because listing a folder
        of ten thousand versions is slow.

        Raises:
            CorruptionError: the newest version is missing.
        """
        number = self._seen.get(ref, 0)
        if not number or not self._exists(ref, number):
            number = self.last(ref)
            if number and not self._exists(ref, number):
                raise CorruptionError(
                    f"version {number} of ref '{ref}' is missing",
                    hint="run 'ckpt verify'; after restoring an older copy, delete cache/refs",
                )
        while self._exists(ref, number + 1):
            number += 1
        if number:
            self._seen[ref] = number
        elif ref == HEAD or self._is_file(_folder(ref)):
            raise CorruptionError(
                f"all versions of ref '{ref}' are missing", hint="run 'ckpt verify --repair'"
            )
        return number

    def _is_file(self, name: str) -> bool:
        try:
            return self._backend.size(name) >= 0
        except (FileNotFoundError, CorruptionError):  # a folder
            return False

    def last(self, ref: str) -> int:
        """Return the newest number of a ref, even if that version is damaged or lost."""
        backup = self.backup(ref)
        number = max([0, *self.numbers(ref), backup.number if backup else 0])
        while self._exists(ref, number + 1):
            number += 1
        return number

    def _exists(self, ref: str, number: int) -> bool:
        try:
            return self._backend.size(_file(ref, number)) >= 0
        except FileNotFoundError:
            return False
        except CorruptionError:
            return True  # something is there

    def numbers(self, ref: str) -> list[int]:
        """Return the numbers of the existing versions, sorted."""
        folder = _folder(ref)
        names = (name.removeprefix(f"{folder}/") for name in self._backend.names(folder))
        return sorted(int(name) for name in names if _GENERATION.match(name))

    def read(self, ref: str) -> Generation | None:
        """Return the newest version, or None if the ref was never set.

        Raises:
            CorruptionError: the newest version is unreadable or missing.  An older version is not
                used instead: that would silently undo commits.
        """
        number = self._newest(ref) if _can_be(ref) else 0
        return self.generation(ref, number) if number else None

    def target(self, ref: str) -> ObjectId | None:
        """Return the commit that the newest version points to, if any.  Raises CorruptionError."""
        version = self.read(ref)
        return version.commit if version else None

    def current_branch(self) -> str | None:
        """Return the branch that HEAD follows, if any.  Raises CorruptionError."""
        head = self.read(HEAD)
        return head.branch if head else None

    def generation(self, ref: str, number: int) -> Generation:
        """Return one version.

        Raises:
            FileNotFoundError, CorruptionError: the version is missing or unreadable.
        """
        return self.parse(ref, number, self.content(ref, number))

    def content(self, ref: str, number: int) -> bytes:
        """Return the unchecked bytes of a version.  Raises FileNotFoundError."""
        return read_small(self._backend, _file(ref, number), _MAX_REF_BYTES)

    def parse(self, ref: str, number: int, data: bytes) -> Generation:
        """Parse and check the bytes of a version.  Raises CorruptionError."""
        name = _file(ref, number)
        values = _VERSION.of_json(unseal(data, name, _OLD), name)
        ref_in_file, number_in_file, previous, commit, branch, time, action, is_lost, lost = values
        if number_in_file != number or ref_in_file != ref:
            raise CorruptionError(f"{name} belongs to another ref")
        if branch is not None and not _can_be(f"heads/{branch}"):
            raise CorruptionError(f"{name} has an invalid branch name")
        digest = lost if is_lost else hex_hash(data)
        return Generation(
            number, digest, previous, commit, branch, time, action, is_lost=bool(is_lost)
        )

    def backup(self, ref: str) -> Generation | None:
        """Return the backup of the newest version, or None if it is missing or damaged."""
        with contextlib.suppress(FileNotFoundError, CkptError):
            data = self.backup_content(ref)
            number = load(data, ref).get("generation")
            if type(number) is int and 0 < number <= _MOST:
                return self.parse(ref, number, data)
        return None

    def backup_content(self, ref: str) -> bytes:
        """Return the bytes of the backup.  Raises FileNotFoundError."""
        return read_small(self._backend, _backup(ref), _MAX_REF_BYTES)

    def reflog(self, ref: str) -> list[Generation]:
        """Return every version of a ref, newest first.  Raises CorruptionError."""
        return [self.generation(ref, number) for number in reversed(self.numbers(ref))]

    def readable(self, ref: str) -> Iterator[Generation]:
        """Yield the readable versions of a ref, newest first."""
        for number in reversed(self.numbers(ref)):
            with contextlib.suppress(FileNotFoundError, CorruptionError):
                yield self.generation(ref, number)

    def check(self, ref: str) -> None:
        """Check all versions.  Raises CorruptionError: one is missing, changed or unreadable."""
        newest = self._newest(ref)  # before the others: more may come
        numbers = [number for number in self.numbers(ref) if number <= newest]
        if numbers != list(range(1, len(numbers) + 1)) or newest != len(numbers):
            raise CorruptionError(f"a version of ref '{ref}' is missing")
        below: Generation | None = None
        for number in numbers:
            move = self.generation(ref, number)
            if not (move.is_lost or follows(move, below)):
                raise CorruptionError(f"{_file(ref, number)} does not follow the version before it")
            below = move

    # -- repair ---------------------------------------------------------------------------------

    def restore(self, ref: str, number: int, data: bytes) -> None:
        """Replace a damaged version by these bytes.

        Raises:
            StorageError: the version cannot be written.
        """
        self._backend.make_way(_folder(ref))
        self._backend.delete(_file(ref, number))
        write_once(self._backend, _file(ref, number), data)

    def mark_lost(self, ref: str, number: int, digest: str | None, time: str) -> None:
        """Replace a version, whose hash was `digest`, by a record that it is lost."""
        data = _dump_version(ref, number, time=time, action="lost", is_lost=True, lost=digest)
        self.restore(ref, number, data)

    def keep_backup(self, ref: str) -> None:
        """Write the backup of the newest version if it is missing."""
        with contextlib.suppress(FileNotFoundError, CkptError):
            newest, backup = self.read(ref), self.backup(ref)
            if newest is not None and (backup is None or backup.number < newest.number):
                self._backend.cache(_backup(ref), self.content(ref, newest.number))

    def repair(
        self,
        ref: str,
        commit: Callable[[Generation | None], ObjectId | None],
        time: str,
        branch: str | None = None,
    ) -> Generation:
        """Rewrite the newest version, which is damaged or missing.

        `commit` chooses its commit, given the newest readable older version.  `branch` is for HEAD
        if no older version names one.

        Raises:
            StorageError: the version cannot be written.
        """
        self._backend.delete(_backup(ref))
        self._backend.make_way(_folder(ref))
        self._seen.pop(ref, None)
        below = None
        for number in sorted({self.last(ref), *self.numbers(ref)} - {0}, reverse=True):
            try:
                below = self.generation(ref, number)
                break
            except (CorruptionError, FileNotFoundError):
                self._backend.delete(_file(ref, number))
        self._seen.pop(ref, None)
        at = commit(below)
        if below is not None and (below.branch or at):
            branch = below.branch
        return self.publish(ref, below, commit=at, branch=branch, time=time, action="repair")

    def _follows(self, ref: str, number: int, data: bytes) -> bool:
        """Return whether another writer has already published a version based on this one."""
        try:
            following = load(self.content(ref, number + 1), ref)
        except FileNotFoundError:
            return False
        return following.get("previous") == hex_hash(data)

    def names(self, space: str) -> list[str]:
        """Return the refs of a space (`heads`, `tags`, `pins`), deleted ones too, sorted."""
        folders = {name.split("/")[2] for name in self._backend.names(f"refs/{space}")}
        backups = {name.split("/")[3] for name in self._backend.names(f"cache/refs/{space}")}
        names = {unquote(folder, errors="replace"): folder for folder in folders | backups}
        return sorted(
            name
            for name, folder in names.items()
            if _can_be(f"{space}/{name}")
            and _folder(f"{space}/{name}") == f"refs/{space}/{folder}"
            and (folder in folders or self.backup(f"{space}/{name}"))
        )

    def every(self) -> list[str]:
        """Return all refs, deleted ones too."""
        spaces = ("heads", "tags", "pins")
        return [HEAD, *(f"{space}/{name}" for space in spaces for name in self.names(space))]

    def branches(self) -> tuple[tuple[str, int], ...]:
        """Return all branches, deleted ones too, with the number of the newest version."""
        return tuple((name, self._newest(f"heads/{name}")) for name in self.names("heads"))

    def settle(self, ref: str) -> None:
        """Make the newest version durable, whoever published it.

        Raises:
            CorruptionError, StorageError: the version is missing or cannot be synced.
        """
        number = self._newest(ref)
        if number:
            self._backend.settle([_file(ref, number)])

    def settle_all(self) -> None:
        """Make the newest versions of all refs durable; of pins only those that may not be yet.

        Raises:
            CorruptionError, StorageError: a version is missing or cannot be synced.
        """
        for ref in self.every():
            if not ref.startswith("pins/"):
                self.settle(ref)
        self.targets("pins")
        self._backend.settle_seen()

    def targets(self, space: str) -> set[ObjectId]:
        """Return the commits that the refs of a space point to."""
        commits = {self.target(f"{space}/{name}") for name in self.names(space)}
        return {commit for commit in commits if commit is not None}

    def readable_targets(self, refs: Iterable[str]) -> set[ObjectId]:
        """Return the commits that some refs point to, without unreadable refs."""
        commits = set()
        for ref in refs:
            with contextlib.suppress(CkptError):
                commits.add(self.target(ref))
        return {commit for commit in commits if commit is not None}

    def publish(
        self,
        ref: str,
        old: Generation | None,
        *,
        commit: ObjectId | None,
        time: str,
        action: str,
        branch: str | None = None,
    ) -> Generation:
        """Move a ref atomically: the commit point of every operation.

        Raises:
            ConflictError: `old` is not the newest version (any more).
        """
        number = (old.number if old else 0) + 1
        if number > _LAST:
            raise CorruptionError(f"ref '{ref}' has no number left for another version")
        previous = old.hash if old else None
        fields = {"commit": commit, "branch": branch, "time": time, "action": action}
        data = _dump_version(ref, number, previous=previous, **fields)
        taken = ConflictError(
            f"'{ref.rpartition('/')[2]}' was moved by another writer",
            hint="check 'ckpt log', then try again",
        )
        try:
            write_once(self._backend, _file(ref, number), data)
        except ConflictError as error:
            raise taken from error
        if self._newest(ref) != number and not self._follows(ref, number, data):
            raise taken
        self._backend.cache(_backup(ref), data)
        return self.parse(ref, number, data)

    def make(self, move: Move) -> None:
        """Put a commit on its branch.

        Raises:
            ConflictError: another writer was first.
        """
        self.publish(
            f"heads/{move.branch}", move.old, commit=move.commit, time=move.time, action="commit"
        )
        # A crash here leaves the commit on its branch and HEAD where it was.
        self._take_head(move)

    def has(self, move: Move) -> bool:
        """Return whether a branch has been moved like this, durably or not."""
        since = move.old.number if move.old else 0
        later = takewhile(
            lambda version: version.number > since, self.readable(f"heads/{move.branch}")
        )
        return any(version.commit == move.commit for version in later)

    def completes(self, move: Move) -> bool:
        """Finish the move of a writer that died; return whether it had moved the branch."""
        if not self.has(move):
            return False
        with contextlib.suppress(ConflictError):  # HEAD has moved since
            self._take_head(move)
        return True

    def _take_head(self, move: Move) -> None:
        if move.takes_head:
            self.publish(
                HEAD, move.head, commit=None, branch=move.branch, time=move.time, action="commit"
            )
