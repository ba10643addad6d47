"""Refs: numbered write-once files; publishing the next number is the only commit point.

    refs/heads/<name>/<generation>     branches
    refs/tags/<name>/<generation>      tags
    refs/pins/<id>/<generation>        pins: commits that keep their exact form
    refs/HEAD/<generation>             what is checked out: a branch, or a commit

Each generation holds the hash of the one it was computed from.  Of two writers that computed the
same next generation one publishes it and the other gets a ConflictError.  Nothing is ever
overwritten or deleted, so older generations are the reflog.  Layout: docs/format.md, "Refs".
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, unquote

from blake3 import blake3

from ckptvcs.errors import ConflictError, CorruptionError, InvalidInputError
from ckptvcs.history.canonical import load, seal, unseal
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.object import ObjectId, checked_id

HEAD = "HEAD"
_MAX_REF_BYTES = 1 << 16
_OLD = frozenset(  # fields of generations that have no check
    ("ref", "generation", "previous", "commit", "branch", "time", "action", "nonce")
)
_LAST = 10**16 - 1
_GENERATION = re.compile(r"[0-9]{16}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}\Z")
_MAX_FILE_NAME = 255
_RESERVED = frozenset({"HEAD", "latest"})


@dataclass(frozen=True)
class Generation:
    """One ref file.  `branch` is set on HEAD where it follows a branch; a tag or branch whose
    `commit` is None has been deleted (or, for a branch, has no commit yet).
    """

    number: int
    hash: str
    commit: ObjectId | None
    branch: str | None
    time: str
    action: str


def check_name(name: str, what: str) -> str:
    """`name`, if it can name a branch or a tag.  Raises InvalidInputError."""
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
    """Where a ref's generations lie.  Upper case is escaped too: some file systems fold it."""
    if ref == HEAD:
        return "refs/HEAD"
    space, _, name = ref.partition("/")
    return f"refs/{space}/{_quoted(name)}"


def _can_be(ref: str) -> bool:
    """Whether a ref may have such a name: none leads to another folder than its own."""
    name = ref.partition("/")[2]
    return ref == HEAD or (_fits(name) and ".." not in name)


class Refs:
    """The refs of one repository.  A ref is `HEAD`, `heads/NAME`, `tags/NAME` or `pins/ID`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._seen: dict[str, int] = {}

    def _newest(self, ref: str) -> int:
        """The number of the newest generation; 0 where there is none.

        Each writer publishes the number after the newest, so that from one that was seen no more
        than the next ones need to be looked for: a folder of ten thousand takes a while to list.
        """
        number = self._seen.get(ref, 0)
        if number and self._exists(ref, number):
            while self._exists(ref, number + 1):
                number += 1
        else:
            number = max(self._numbers(ref), default=0)
        if number:
            self._seen[ref] = number
        return number

    def _exists(self, ref: str, number: int) -> bool:
        try:
            return self._backend.size(f"{_folder(ref)}/{number:016}") >= 0
        except FileNotFoundError:
            return False

    def _numbers(self, ref: str) -> list[int]:
        folder = _folder(ref)
        names = (name.removeprefix(f"{folder}/") for name in self._backend.names(folder))
        return sorted(int(name) for name in names if _GENERATION.match(name))

    def read(self, ref: str) -> Generation | None:
        """The newest generation; None where the ref was never set, or cannot be.

        Raises:
            CorruptionError: the newest generation is unreadable.  Older ones are not used in
                its place: that would silently take commits back.
        """
        number = self._newest(ref) if _can_be(ref) else 0
        return self._read(ref, number) if number else None

    def _read(self, ref: str, number: int) -> Generation:
        name = f"{_folder(ref)}/{number:016}"
        data = read_small(self._backend, name, _MAX_REF_BYTES)
        record = unseal(data, name, _OLD)
        commit = record.optional_text("commit")
        if record.integer("generation") != number or record.text("ref") != ref:
            raise CorruptionError(f"{name} belongs to another ref")
        branch = record.optional_text("branch")
        if branch is not None and not _can_be(f"heads/{branch}"):
            raise CorruptionError(f"{name} follows a branch that cannot be")
        return Generation(
            number, blake3(data).hexdigest(), None if commit is None else checked_id(commit),
            branch, record.text("time"), record.text("action"),
        )  # fmt: skip

    def reflog(self, ref: str) -> list[Generation]:
        """Every generation of a ref, newest first."""
        return [self._read(ref, number) for number in reversed(self._numbers(ref))]

    def mend(
        self, ref: str, commit: Callable[[Generation | None], ObjectId | None], time: str
    ) -> None:
        """Write the newest generation anew, which is damaged; `commit` says what it is at, from the
        newest one below that can be read.

        Raises:
            StorageError: it cannot be written.
        """
        below = None
        for number in reversed(self._numbers(ref)):
            try:
                below = self._read(ref, number)
                break
            except CorruptionError:
                self._backend.delete(f"{_folder(ref)}/{number:016}")
        self._seen.pop(ref, None)
        at, branch = commit(below), below.branch if below else None
        if ref == HEAD and branch is None and at is None:
            branch = "main"
        self.publish(ref, below, commit=at, branch=branch, time=time, action="repair")

    def check(self, ref: str) -> None:
        """Raises CorruptionError where a generation is missing, changed or unreadable."""
        numbers = self._numbers(ref)
        if numbers != list(range(1, len(numbers) + 1)):
            raise CorruptionError(f"a generation of '{ref}' is missing")
        below: Generation | None = None
        for number in numbers:
            name = f"{_folder(ref)}/{number:016}"
            record = load(read_small(self._backend, name, _MAX_REF_BYTES), name)
            if record.optional_text("previous") != (below.hash if below else None):
                raise CorruptionError(f"{name} does not follow the generation before it")
            below = self._read(ref, number)

    def _follows(self, ref: str, number: int, data: bytes) -> bool:
        """Whether the next generation was computed from this one: another writer was quick."""
        name = f"{_folder(ref)}/{number + 1:016}"
        try:
            record = load(read_small(self._backend, name, _MAX_REF_BYTES), name)
        except FileNotFoundError:
            return False
        return record.optional_text("previous") == blake3(data).hexdigest()

    def names(self, space: str) -> list[str]:
        """The branches (`heads`) or tags (`tags`) that ever were, sorted."""
        folders = {name.split("/")[2] for name in self._backend.names(f"refs/{space}")}
        found = {unquote(folder, errors="replace"): folder for folder in folders}
        return sorted(
            name for name, folder in found.items()
            if _can_be(f"{space}/{name}") and _folder(f"{space}/{name}") == f"refs/{space}/{folder}"
        )  # fmt: skip

    def every(self) -> list[str]:
        """All refs that ever were."""
        spaces = ("heads", "tags", "pins")
        return [HEAD, *(f"{space}/{name}" for space in spaces for name in self.names(space))]

    def branches(self) -> tuple[tuple[str, int], ...]:
        """The branches that ever were, each with the number of its newest generation."""
        return tuple((name, self._newest(f"heads/{name}")) for name in self.names("heads"))

    def targets(self, space: str) -> set[ObjectId]:
        """The commits that the refs of a space are at."""
        found = (self.read(f"{space}/{name}") for name in self.names(space))
        return {state.commit for state in found if state is not None and state.commit is not None}

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
        """Move a ref: the one commit point.  A crash before leaves it as it was.

        Raises:
            ConflictError: `old` is not the newest generation (any more).
        """
        number = (old.number if old else 0) + 1
        if number > _LAST:
            raise CorruptionError(f"'{ref}' has no number left for another generation")
        fields = {
            "ref": ref, "generation": number, "previous": old.hash if old else None,
            "commit": commit, "branch": branch, "time": time, "action": action,
            "nonce": secrets.token_hex(8),
        }  # fmt: skip
        data = seal(fields)
        taken = ConflictError(
            f"'{ref.rpartition('/')[2]}' was moved by another writer",
            hint="look at 'ckpt log' and try again",
        )
        try:
            write_once(self._backend, f"{_folder(ref)}/{number:016}", data)
        except ConflictError as error:
            raise taken from error
        if self._newest(ref) != number and not self._follows(ref, number, data):
            raise taken
        return Generation(number, blake3(data).hexdigest(), commit, branch, time, action)
