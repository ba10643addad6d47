"""How a command ends: errors to one line, a hint and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection
from itertools import takewhile

from ckptvcs.cli import render
from ckptvcs.cli.streams import ReaderGoneError
from ckptvcs.cli.usage import explain
from ckptvcs.errors import NO_MEMORY, CkptError, CorruptionError, StorageError

INTERRUPTED = 130
TERMINATED = (128 + signal.SIGTERM, 128 + signal.SIGHUP)


def _tell_end(how: str, code: int, done: str, *, json: bool) -> None:
    """Say that a signal has ended the command, and what is `done`."""
    error = CkptError(f"{how}; {done or 'the repository is unchanged or complete'}")
    error.kind, error.exit_code = how, code
    if json:
        render.failure(error, json=True)
    else:
        render.complain(error.message)


def end(error: BaseException, *, json: bool, commands: Collection[str] = ()) -> int | None:
    """Report the end of a command and return the exit code; None for a bug or a plain exit.

    `commands` are the names of all commands, for hints.
    """
    done = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        _tell_end("interrupted", INTERRUPTED, done, json=json)
        return INTERRUPTED
    if isinstance(error, SystemExit):
        if error.code in TERMINATED:
            _tell_end("terminated", int(error.code), done, json=json)
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
            error.hint = "run 'ckpt verify' to list the damage"
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
