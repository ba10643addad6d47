"""Every error a caller can meet, grouped by what a caller would do about it.

    CkptError                    exit 1   nothing better is known
      InvalidInputError (ValueError)  2   change what was asked for
      NotFoundError (KeyError)        3   name something that exists
      ConflictError                   4   somebody else moved it: look again and retry
      BusyError                       5   somebody else is at work: wait
      CorruptionError                 6   stored bytes are wrong: verify, restore
        TruncatedError                    ... they end too early
        MissingObjectError                ... they are not there at all
      UnsupportedVersionError         7   upgrade ckptvcs
      StorageError                    8   the system refused: disk, network, memory, output
      MissingExtraError (ImportError) 9   install the named extra of ckptvcs

Decoders raise only these.  Anything else that reaches the command line is a bug.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ckptvcs.text import plain

NO_MEMORY = os.strerror(errno.ENOMEM)


class CkptError(Exception):
    """Base of the tree: one line for the user, and a hint on what to do next."""

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return plain(self.message)  # a traceback goes to a terminal, too


class InvalidInputError(CkptError, ValueError):
    """What was asked for cannot be done as asked."""

    kind = "invalid-input"
    exit_code = 2


class NotFoundError(CkptError, KeyError):
    """No such repository, revision, ref or tensor."""

    kind = "not-found"
    exit_code = 3


class ConflictError(CkptError):
    """Another writer was first, or work would be lost."""

    kind = "conflict"
    exit_code = 4


class BusyError(CkptError):
    """Another process holds what this one needs."""

    kind = "busy"
    exit_code = 5


class CorruptionError(CkptError):
    """Stored bytes are not what their name or their hash says."""

    kind = "corruption"
    exit_code = 6


class TruncatedError(CorruptionError):
    """Stored bytes end before they should."""

    kind = "truncated"


class MissingObjectError(CorruptionError):
    """An object that others need is not in the store."""

    kind = "missing-object"


class UnsupportedVersionError(CkptError):
    """The bytes were written by a newer program."""

    kind = "unsupported-version"
    exit_code = 7


class StorageError(CkptError):
    """The system refused: a disk that is full, read-only, or failing; no memory."""

    kind = "storage"
    exit_code = 8


class MissingExtraError(CkptError, ImportError):
    """An optional package is not installed."""

    kind = "missing-extra"
    exit_code = 9


def missing_extra(package: str) -> MissingExtraError:
    """Return the error for a package that cannot be imported; its extra has the same name."""
    return MissingExtraError(f"cannot import {package}: run pip install 'ckptvcs[{package}]'")


def optional(package: str) -> Any:
    """Import and return a package that only an extra of ckptvcs installs.

    Raises:
        MissingExtraError: the package cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise missing_extra(package) from error


def refuse_memory(error: Exception) -> None:
    """Raises MemoryError where that is what a library in C says in its own words: bytes that cannot
    be decompressed for want of memory are not damaged.
    """
    if "llocation error" in str(error):
        raise MemoryError(str(error)) from error


@contextmanager
def after(what: str | Callable[[], str]) -> Iterator[None]:
    """Something is done and stays, such as a commit: whatever ends the block says so first.

    Errors of ckptvcs say it in their message.  Those of the system become a StorageError.  All
    others get a note.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if not _text(what):
            raise
        reason = NO_MEMORY if isinstance(error, MemoryError) else error.strerror or str(error)
        raise StorageError(_joined(what, reason)) from error
    except CkptError as error:
        error.message = _joined(what, error.message)
        error.args = (error.message,)
        raise
    except BaseException as error:
        done = _text(what)
        if done and done not in getattr(error, "__notes__", ()):
            error.add_note(done)
        raise


def _text(what: str | Callable[[], str]) -> str:
    return what if isinstance(what, str) else what()


def _joined(what: str | Callable[[], str], reason: str) -> str:
    done = _text(what)
    return reason if not done or reason.startswith(done) else f"{done}, but: {reason}"
