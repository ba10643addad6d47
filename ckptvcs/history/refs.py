"""Refs: numbered write-once files; publishing the next number is the only commit point.

    refs/heads/<name>/<generation>     branches
    refs/tags/<name>/<generation>      tags
    refs/pins/<id>/<generation>        pins: commits that keep their exact form
    refs/HEAD/<generation>             what is checked out: a branch, or a commit

Each generation holds the hash of the one it was computed from.  Of two writers that computed the
same next generation one publishes it and the other gets a ConflictError.  Nothing is ever
overwritten or deleted, so older generations are the reflog.  The newest one, which no other holds
the hash of, lies in the cache once more, so that it is missed.  Layout: docs/format.md, "Refs".
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from urllib.parse import quote, unquote

from ckptvcs.errors import CkptError, ConflictError, CorruptionError, InvalidInputError
from ckptvcs.hashing import hex_hash
from ckptvcs.history.canonical_json import load, seal, unseal
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.ids import ObjectId, checked_id

HEAD = "HEAD"
_MAX_REF_BYTES = 1 << 16
_OLD = frozenset(  # fields of generations that have no check
    ("ref", "generation", "previous", "commit", "branch", "time", "action", "nonce")
)
_LAST = 10**16 - 1
_MOST = 10**9  # moves of a ref, that somebody may be believed to have made
_GENERATION = re.compile(r"[0-9]{16}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}\Z")
_MAX_FILE_NAME = 255
_RESERVED = frozenset({"HEAD", "latest"})


@dataclass(frozen=True)
class Generation:
    """One ref file.  `branch` is set on HEAD where it follows a branch; a tag or branch whose
    `commit` is None has been deleted (or, for a branch, has no commit yet).  `previous` is the hash
    of the one it was computed from.  One that `is_lost` stands where a repair found none: its hash
    is what the next one says, None if that is not known.
    """

    number: int
    hash: str | None
    previous: str | None
    commit: ObjectId | None
    branch: str | None
    time: str
    action: str
    is_lost: bool = False


@dataclass(frozen=True)
class Move:
    """A branch that is about to move from `old` to a commit; HEAD, which is at `head`, follows the
    branch from then on if `takes_head`.
    """

    commit: ObjectId
    branch: str
    old: Generation | None
    head: Generation | None
    takes_head: bool
    time: str


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


def _file(ref: str, number: int) -> str:
    return f"{_folder(ref)}/{number:016}"


def _spare(ref: str) -> str:
    return f"cache/{_folder(ref)}"


def follows(move: Generation, below: Generation | None) -> bool:
    """Whether a generation was computed from the one below it, as far as can be known."""
    own = below.hash if below else None
    return move.previous == own or (below is not None and own is None)


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

        Raises:
            CorruptionError: there was a newer one.
        """
        number = self._seen.get(ref, 0)
        if not number or not self._exists(ref, number):
            number = max(self.numbers(ref), default=0)
            spare = self.spare(ref)
            if spare is not None and spare.number > number:
                number = spare.number
                if not self._exists(ref, number):
                    raise CorruptionError(
                        f"generation {number} of '{ref}' is missing",
                        hint="see 'ckpt verify'; if an older copy was put back, delete cache/refs",
                    )
        while self._exists(ref, number + 1):
            number += 1
        if number:
            self._seen[ref] = number
        elif ref == HEAD or self._is_file(_folder(ref)):
            raise CorruptionError(f"all of '{ref}' is missing", hint="see 'ckpt verify --repair'")
        return number

    def _is_file(self, name: str) -> bool:
        try:
            return self._backend.size(name) >= 0
        except (FileNotFoundError, CorruptionError):  # a folder
            return False

    def last(self, ref: str) -> int:
        """The number of the newest generation that there is, damaged or not, or was."""
        spare = self.spare(ref)
        number = max([0, *self.numbers(ref), spare.number if spare else 0])
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
        """The numbers of the generations that there are, sorted."""
        folder = _folder(ref)
        names = (name.removeprefix(f"{folder}/") for name in self._backend.names(folder))
        return sorted(int(name) for name in names if _GENERATION.match(name))

    def read(self, ref: str) -> Generation | None:
        """The newest generation; None where the ref was never set, or cannot be.

        Raises:
            CorruptionError: the newest generation is unreadable, or missing.  Older ones are not
                used in its place: that would silently take commits back.
        """
        number = self._newest(ref) if _can_be(ref) else 0
        return self.generation(ref, number) if number else None

    def generation(self, ref: str, number: int) -> Generation:
        """One generation.

        Raises:
            FileNotFoundError, CorruptionError: it is missing, or unreadable.
        """
        return self.parse(ref, number, self.content(ref, number))

    def content(self, ref: str, number: int) -> bytes:
        """The bytes of a generation, unproven.  Raises FileNotFoundError."""
        return read_small(self._backend, _file(ref, number), _MAX_REF_BYTES)

    def parse(self, ref: str, number: int, data: bytes) -> Generation:
        """A generation from its bytes.  Raises CorruptionError."""
        name = _file(ref, number)
        record = unseal(data, name, _OLD)
        commit = record.optional_text("commit")
        if record.integer("generation") != number or record.text("ref") != ref:
            raise CorruptionError(f"{name} belongs to another ref")
        branch = record.optional_text("branch")
        if branch is not None and not _can_be(f"heads/{branch}"):
            raise CorruptionError(f"{name} follows a branch that cannot be")
        is_lost = record.flag("is_lost")
        own = record.optional_text("lost") if is_lost else hex_hash(data)
        return Generation(
            number,
            own,
            record.optional_text("previous"),
            None if commit is None else checked_id(commit),
            branch,
            record.text("time"),
            record.text("action"),
            is_lost,
        )

    def spare(self, ref: str) -> Generation | None:
        """The newest generation as the cache has it; None where it has none, or a damaged one."""
        with contextlib.suppress(FileNotFoundError, CkptError):
            data = self.spare_content(ref)
            number = load(data, ref).integer("generation")
            return self.parse(ref, number, data) if 0 < number <= _MOST else None
        return None

    def spare_content(self, ref: str) -> bytes:
        """Its bytes.  Raises FileNotFoundError."""
        return read_small(self._backend, _spare(ref), _MAX_REF_BYTES)

    def reflog(self, ref: str) -> list[Generation]:
        """Every generation of a ref, newest first.  Raises CorruptionError: one is unreadable."""
        return [self.generation(ref, number) for number in reversed(self.numbers(ref))]

    def readable(self, ref: str) -> Iterator[Generation]:
        """The generations of a ref that can be read, newest first."""
        for number in reversed(self.numbers(ref)):
            with contextlib.suppress(FileNotFoundError, CorruptionError):
                yield self.generation(ref, number)

    def check(self, ref: str) -> None:
        """Raises CorruptionError where a generation is missing, changed or unreadable."""
        newest = self._newest(ref)  # before the others: more may come
        numbers = [number for number in self.numbers(ref) if number <= newest]
        if numbers != list(range(1, len(numbers) + 1)) or newest != len(numbers):
            raise CorruptionError(f"a generation of '{ref}' is missing")
        below: Generation | None = None
        for number in numbers:
            move = self.generation(ref, number)
            if not (move.is_lost or follows(move, below)):
                raise CorruptionError(
                    f"{_file(ref, number)} does not follow the generation before it"
                )
            below = move

    # -- mending -------------------------------------------------------------------------------

    def restore(self, ref: str, number: int, data: bytes) -> None:
        """Put the bytes of a generation in the place of what is damaged.

        Raises:
            StorageError: it cannot be written.
        """
        self._backend.make_way(_folder(ref))
        self._backend.delete(_file(ref, number))
        write_once(self._backend, _file(ref, number), data)

    def mark_lost(self, ref: str, number: int, own: str | None, time: str) -> None:
        """Say of a generation that it is lost, whose hash was `own`."""
        self.restore(
            ref,
            number,
            seal(
                {
                    "ref": ref,
                    "generation": number,
                    "previous": None,
                    "commit": None,
                    "branch": None,
                    "time": time,
                    "action": "lost",
                    "nonce": os.urandom(8).hex(),
                    "is_lost": True,
                    "lost": own,
                }
            ),
        )

    def keep_spare(self, ref: str) -> None:
        """Put the newest generation into the cache once more, if it is not there."""
        with contextlib.suppress(FileNotFoundError, CkptError):
            newest, spare = self.read(ref), self.spare(ref)
            if newest is not None and (spare is None or spare.number < newest.number):
                self._backend.cache(_spare(ref), self.content(ref, newest.number))

    def mend(
        self,
        ref: str,
        commit: Callable[[Generation | None], ObjectId | None],
        time: str,
        branch: str | None = None,
    ) -> Generation:
        """Write the newest generation anew, which is damaged or missing; `commit` says what it is
        at, from the newest one below that can be read.  `branch` is what HEAD follows where nothing
        below says so.

        Raises:
            StorageError: it cannot be written.
        """
        self._backend.delete(_spare(ref))
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
        """Whether the next generation was computed from this one: another writer was quick."""
        try:
            record = load(self.content(ref, number + 1), ref)
        except FileNotFoundError:
            return False
        return record.optional_text("previous") == hex_hash(data)

    def names(self, space: str) -> list[str]:
        """The branches (`heads`) or tags (`tags`) that ever were, sorted."""
        folders = {name.split("/")[2] for name in self._backend.names(f"refs/{space}")}
        spares = {name.split("/")[3] for name in self._backend.names(f"cache/refs/{space}")}
        found = {unquote(folder, errors="replace"): folder for folder in folders | spares}
        return sorted(
            name
            for name, folder in found.items()
            if _can_be(f"{space}/{name}")
            and _folder(f"{space}/{name}") == f"refs/{space}/{folder}"
            and (folder in folders or self.spare(f"{space}/{name}"))
        )

    def every(self) -> list[str]:
        """All refs that ever were."""
        spaces = ("heads", "tags", "pins")
        return [HEAD, *(f"{space}/{name}" for space in spaces for name in self.names(space))]

    def branches(self) -> tuple[tuple[str, int], ...]:
        """The branches that ever were, each with the number of its newest generation."""
        return tuple((name, self._newest(f"heads/{name}")) for name in self.names("heads"))

    def settle(self, ref: str) -> None:
        """Make the newest generation durable, whoever has published it.

        Raises:
            CorruptionError, StorageError: it is missing, or cannot be synced.
        """
        number = self._newest(ref)
        if number:
            self._backend.settle([_file(ref, number)])

    def settle_all(self) -> None:
        """Make durable what all refs are at, pins as far as they may not be yet.

        Raises:
            CorruptionError, StorageError: one is missing, or cannot be synced.
        """
        for ref in self.every():
            if not ref.startswith("pins/"):
                self.settle(ref)
        self.targets("pins")
        self._backend.settle_seen()

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
            "ref": ref,
            "generation": number,
            "previous": old.hash if old else None,
            "commit": commit,
            "branch": branch,
            "time": time,
            "action": action,
            "nonce": os.urandom(8).hex(),
        }
        data = seal(fields)
        taken = ConflictError(
            f"'{ref.rpartition('/')[2]}' was moved by another writer",
            hint="look at 'ckpt log' and try again",
        )
        try:
            write_once(self._backend, _file(ref, number), data)
        except ConflictError as error:
            raise taken from error
        if self._newest(ref) != number and not self._follows(ref, number, data):
            raise taken
        self._backend.cache(_spare(ref), data)
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
        """Whether a branch has been moved so, durably or not."""
        since = move.old.number if move.old else 0
        later = takewhile(lambda one: one.number > since, self.readable(f"heads/{move.branch}"))
        return any(one.commit == move.commit for one in later)

    def completes(self, move: Move) -> bool:
        """Whether a writer that died had put its commit on the branch; HEAD follows now, if that
        was all that was left to do.
        """
        if not self.has(move):
            return False
        with contextlib.suppress(ConflictError):  # it is elsewhere already
            self._take_head(move)
        return True

    def _take_head(self, move: Move) -> None:
        if move.takes_head:
            self.publish(
                HEAD, move.head, commit=None, branch=move.branch, time=move.time, action="commit"
            )
