"""Follow an index that others write: its newest edition, and the journals from its number on."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import lmdb

from ckptvcs.store import forking
from ckptvcs.store.index.editions import Family, open_edition
from ckptvcs.store.index.journal import MOST_BYTES, Journal, VoidError, append_record, void
from ckptvcs.store.index.recent import Recent
from ckptvcs.store.index.rows import ROTTEN, load_rows

_TRIES = 5  # other processes may make a new edition each time
_MOST_OWN_BYTES = 1 << 23  # of journals, kept in memory on top of a private edition
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Follower:
    """The current content of the files of one family.

    The callers of `read`, `open`, `go_on` and `append` hold `forking.using`.

    If the edition is private (`own`), this still reads the shared journals.  Without a journal, it
    has only the rows that this process wrote.
    """

    def __init__(self, family: Family) -> None:
        """Open nothing yet; `read` does."""
        self._family = family
        self._recent: Recent | None = None
        self._tail: Journal | None = None  # the newest journal
        self._bad = self._last = 0  # the last damaged edition; the number of the newest journal
        self._next = self._awaited = ""  # paths of the next journal, of the next edition
        self._awaits = True  # whether to switch to the next shared edition
        self._taken = 0  # bytes of earlier journals
        self.number = 0
        """The number of the edition; 0 if it is private."""
        self.own = False
        self.turn = 0
        """How often files were opened."""

    def read(self) -> Recent:
        """Return the current content.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        recent, tail = self._recent, self._tail
        if recent is None or recent.base.env is None:  # None: in a forked child
            return self.open()
        if tail is None or tail.has_changed():
            return self._catch_up(recent)
        return recent

    def open(self) -> Recent:
        """Open the newest edition and its journals.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        self.close()
        number = self._bad
        for _ in range(_TRIES):
            editions, journals = self._family.scan()
            number = max(editions, default=0)
            if number <= self._bad:
                break
            try:
                return self._open_at(number, max(journals, default=0))
            except (FileNotFoundError, BlockingIOError, VoidError):
                continue  # another process has made a new edition
            except ROTTEN:
                self._bad = number
                raise
        self._bad = max(number, self._bad)
        raise lmdb.InvalidError("no edition can be used")

    def _open_at(self, number: int, last: int) -> Recent:
        base, tail, left = open_edition(self._family.edition(number)), None, MOST_BYTES
        try:
            recent = Recent(base)
            for journal in range(number, last + 1):
                if tail is not None:
                    tail.close()
                tail = Journal(self._family.journal(journal))
                take(recent, tail)
                left -= tail.read_bytes
                if journal < last and not tail.ended:  # announcing the next journal had failed
                    with contextlib.suppress(OSError, VoidError):
                        append_record(tail.path, b"")
            _require(tail is not None and left >= 0)
        except BaseException:
            base.leave()
            if tail is not None:
                tail.close()
            raise
        self.number, self.own, self._awaits = number, False, True
        self._awaited = str(self._family.edition(last)) if last > number else ""
        self._follow(recent, tail, last)
        return recent

    def go_on(self, recent: Recent, last: int, *, follow: bool, awaits: bool) -> None:
        """Continue with a private edition.

        With `follow`, read the shared journals from the `last` one on.  With `awaits`, switch back
        to the next shared edition.
        """
        self.close()
        tail = None
        if follow and last:
            with contextlib.suppress(OSError, *ROTTEN):
                tail = _taken(recent, self._family.journal(last))
        coming = self._family.edition(last)
        self.number, self.own, self._awaits, self._taken = 0, True, awaits, 0
        self._awaited = str(coming) if awaits and tail is not None and not coming.exists() else ""
        self._follow(recent, tail, last)

    def _follow(self, recent: Recent, tail: Journal | None, last: int) -> None:
        self._recent, self._tail, self._last = recent, tail, last
        self._next = str(self._family.journal(last + 1))
        self.turn += 1

    def _catch_up(self, recent: Recent) -> Recent:
        if self._tail is None:
            if not os.access(self._next, os.F_OK):
                return recent
            return self.open() if self._newest() > max(self._last, self._bad) else recent
        try:
            while True:
                has_next = os.access(self._next, os.F_OK)  # check before reading to the end
                if has_next and self._awaits and self._newest() > max(self._last, self._bad):
                    return self.open()  # the new edition contains the rest of this journal
                take(recent, self._tail)
                if not has_next:
                    break
                tail = Journal(Path(self._next))
                self._taken += self._tail.read_bytes
                self._tail.close()
                self._follow(recent, tail, self._last + 1)
                if self._awaits:
                    self._awaited = str(self._family.edition(self._last))
        except (FileNotFoundError, VoidError):
            return self.open()
        too_much = self.own and self._taken + self._tail.read_bytes > _MOST_OWN_BYTES
        if too_much or (self._awaited and os.access(self._awaited, os.F_OK)):
            return self.open()
        return recent

    def _newest(self) -> int:
        return max(self._family.scan()[0], default=0)

    def look_again(self) -> None:
        """Reopen the files if their folder was replaced.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        with forking.using:
            self.read()
            if self._tail is not None and not self._tail.is_there():
                self.open()

    def distrust(self) -> None:
        """Never open this edition again, only newer ones: its content is wrong."""
        with forking.using:
            self._bad = max(self._bad, self.number)
            self.close()

    @property
    def unread_bytes(self) -> int:
        """Bytes of the newest journal, which the next edition will contain."""
        return 0 if self._tail is None else self._tail.read_bytes

    def append(self, record: bytes) -> bool:
        """Append a record to the newest journal; return whether `read` will find it there.

        Raises:
            lmdb.Error, ValueError, OSError: no edition can be used.
        """
        for _ in range(_TRIES):
            tail, number = self._tail, self._last
            if tail is None:
                number = max(self._family.scan()[1], default=0)
                if number <= self._last:
                    return False
            try:
                _require(tail is None or tail.is_there())
                journal = self._family.journal
                while append_record(journal(number), record, journal(number + 1)):
                    number += 1
                return tail is not None
            except (VoidError, FileNotFoundError):
                if tail is None:
                    return False
                self.open()
            except OSError as error:
                if error.errno not in _FORBIDDEN:
                    self._void_tail()
                return False
        return False

    def _void_tail(self) -> None:
        """Make the journal void, because it lacks a record."""
        tail, self._tail = self._tail, None
        if tail is not None:
            tail.close()  # `void` needs a descriptor, and there may be no other
            with contextlib.suppress(OSError):
                void(tail.path)

    def close(self) -> None:
        """Close the files; `read` opens them again."""
        with forking.using:
            recent, tail = self._recent, self._tail
            self._recent = self._tail = None
            if recent is not None:
                recent.base.leave()
            if tail is not None:
                tail.close()


def take(recent: Recent, journal: Journal) -> None:
    """Apply the unread records of a journal.  Raises VoidError, struct.error, OSError."""
    for record in journal.read():
        recent.apply(load_rows(record))


def _taken(recent: Recent, path: Path) -> Journal:
    """Open a journal and apply it.  Raises VoidError, struct.error, OSError."""
    journal = Journal(path)
    try:
        take(recent, journal)
    except BaseException:
        journal.close()
        raise
    return journal


def _require(sound: bool) -> None:
    if not sound:
        raise VoidError
