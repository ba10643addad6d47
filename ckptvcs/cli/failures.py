"""How a command ends: errors to one line, a hint and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Collection
from itertools import takewhile

from ckptvcs.cli import render
from ckptvcs.cli.streams import ReaderGoneError
from ckptvcs.cli.usage import explain
from ckptvcs.errors import NO_MEMORY, CkptError, CorruptionError, StorageError

INTERRUPTED = 130


class _Interrupted(CkptError):
    kind = "interrupted"
    exit_code = INTERRUPTED


def end(error: BaseException, *, json: bool, commands: Collection[str] = ()) -> int | None:
    """Report the end of a command and return the exit code; None for a bug or a plain exit.

    `commands` are the names of all commands, for hints.
    """
    done = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        message = f"interrupted; {done or 'the repository is unchanged or complete'}"
        if json:
            render.failure(_Interrupted(message), json=True)
        else:
            render.complain(message)
        return INTERRUPTED
    if isinstance(error, SystemExit):
        if done:
            render.complain(f"terminated; {done}")
        return None
    refusal = _refusal(error, commands)
    if refusal is None:
        return None
    if not isinstance(refusal, ReaderGoneError):
        refusal.message = f"{done}, but: {refusal.message}" if done else refusal.message
        render.failure(refusal, json=json)
    return refusal.exit_code


def _refusal(error: BaseException, commands: Collection[str]) -> CkptError | None:
    """Return the error to show to the user; None for a bug."""
    if isinstance(error, CkptError):
        if isinstance(error, CorruptionError) and error.hint is None:
            error.hint = "run 'ckpt verify' to list what is damaged"
        return error
    if isinstance(error, render.UsageError):
        return explain(error, sys.argv[1:], commands)
    # numpy's sum returns without its MemoryError where it has no memory for its iterator.
    lost = isinstance(error, SystemError) and "without exception set" in str(error)
    if lost or isinstance(error, MemoryError):
        return StorageError(NO_MEMORY, hint="free some memory, or raise the limit (ulimit -v)")
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot use{where}: {error.strerror or error}")
    if isinstance(error, ImportError):
        while isinstance(error.__cause__, ImportError):  # numpy wraps it in a page of advice
            error = error.__cause__
        return StorageError(f"cannot load a module: {error}", hint="check that it is installed")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return StorageError(str(error), hint="raise the limit of processes (ulimit -u)")
    return None


def wants_json() -> bool:
    """Return whether the options of the command line contain --json."""
    return "--json" in takewhile(lambda word: word != "--", sys.argv[1:])


def bug(error: Exception) -> int:
    """Report an exception that is a bug; return the exit code."""
    render.bug()
    found = CkptError(f"unexpected failure: {type(error).__name__}: {error}")
    if wants_json():
        render.failure(found, json=True)
    return found.exit_code
