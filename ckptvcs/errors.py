"""The errors that ckptvcs raises, grouped by what the caller can do.

    CkptError                    exit 1   any other error
      InvalidInputError (ValueError)  2   change the arguments
      NotFoundError (KeyError)        3   name something that exists
      ConflictError                   4   another process changed it: look again and retry
      BusyError                       5   another process is at work: wait
      CorruptionError                 6   stored bytes are wrong: verify, restore
        TruncatedError                    ... they end too early
        MissingObjectError                ... they are missing
      UnsupportedVersionError         7   upgrade ckptvcs
      StorageError                    8   the system refused: disk, network, memory, output
      MissingExtraError (ImportError) 9   install the named extra of ckptvcs

Decoders raise only these.  Any other exception that reaches the command line is a bug.
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
    """Base class: one line for the user, and a hint on what to do next."""

    kind = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return plain(self.message)  # a terminal may show it in a traceback


class InvalidInputError(CkptError, ValueError):
    """An argument is invalid, or the request cannot be fulfilled."""

    kind = "invalid-input"
    exit_code = 2


class NotFoundError(CkptError, KeyError):
    """A repository, revision, ref or tensor does not exist."""

    kind = "not-found"
    exit_code = 3


class ConflictError(CkptError):
    """Another writer was first, or changes would be lost."""

    kind = "conflict"
    exit_code = 4


class BusyError(CkptError):
    """Another process is using the repository."""

    kind = "busy"
    exit_code = 5


class CorruptionError(CkptError):
    """Stored bytes do not match their name or hash."""

    kind = "corruption"
    exit_code = 6


class TruncatedError(CorruptionError):
    """Stored bytes end before they should."""

    kind = "truncated"


class MissingObjectError(CorruptionError):
    """An object that other objects need is missing."""

    kind = "missing-object"


class UnsupportedVersionError(CkptError):
    """The bytes were written by a newer program."""

    kind = "unsupported-version"
    exit_code = 7


class StorageError(CkptError):
    """The system refused: the disk is full, read-only or failing, or memory ran out."""

    kind = "storage"
    exit_code = 8


class MissingExtraError(CkptError, ImportError):
    """An optional package is not installed."""

    kind = "missing-extra"
    exit_code = 9


def missing_extra(package: str) -> MissingExtraError:
    """Return the error for a package whose extra of ckptvcs has the same name."""
    return MissingExtraError(f"cannot import {package}: run pip install 'ckptvcs[{package}]'")


def optional(package: str) -> Any:
    """Import and return a package that an extra of ckptvcs installs.

    Raises:
        MissingExtraError: the package cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise missing_extra(package) from error


def refuse_memory(error: Exception) -> None:
    """Raise MemoryError if `error` is the "out of memory" error of a C library.

    Without this, bytes that need too much memory to decompress would be reported as damaged.
    """
    if "llocation error" in str(error):
        raise MemoryError(str(error)) from error


@contextmanager
def after(what: str | Callable[[], str]) -> Iterator[None]:
    """Begin every error of the block with `what`, a change that stays in spite of the error.

    An error of ckptvcs gets it in its message, a system error becomes a StorageError, and any
    other exception gets a note.
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
