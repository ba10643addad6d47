"""Standard output and standard error that handle errors of the system.

If output cannot be written, that is one error.  The rest of the output is discarded, so that the
interpreter does not fail again when it exits.  An error of standard error is ignored.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import Self, TextIO

from ckptvcs.errors import StorageError

_HINT = "print to another file; the command has made its changes"


class OutputError(StorageError):
    """Standard output cannot be written."""


class ReaderGoneError(OutputError):
    """The reader of standard output has closed it (`ckpt log | head`), which is not a failure."""

    exit_code = 0


class _Waiting(io.FileIO):
    """A descriptor that another process may set to non-blocking: a write waits until it can."""

    def write(self, data: object) -> int:
        while (count := super().write(data)) is None:  # type: ignore[arg-type]
            select.select([], [self.fileno()], [])
        return count


class _Stream(io.TextIOWrapper):
    @classmethod
    def of(cls, stream: TextIO | None, number: int) -> Self:
        """Return the replacement of a stream of Python; None is a closed stream."""
        encoding, lines = "utf-8", False
        if isinstance(stream, io.TextIOWrapper):
            encoding, lines = stream.encoding, stream.line_buffering or stream.write_through
        raw = io.BufferedWriter(_Waiting(number, "w", closefd=False))
        # The encoding may lack characters of a name.
        return cls(raw, encoding, "backslashreplace", line_buffering=lines)

    def give_up(self) -> None:
        """Discard the rest of the output."""
        number = self.fileno()
        with contextlib.suppress(OSError):
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
            except OSError:  # no other descriptor is free
                os.close(number)
                nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


class Output(_Stream):
    """Standard output.  Raises OutputError."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._refused(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OutputError:
        self.give_up()
        kind = ReaderGoneError if isinstance(error, BrokenPipeError) else OutputError
        reason = error.strerror or str(error)
        return kind(f"cannot write to standard output: {reason}", hint=_HINT)


class Talk(_Stream):
    """Standard error."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.give_up()


def prepare() -> None:
    """Replace the streams of this process."""
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout, sys.stderr = Output.of(sys.stdout, 1), Talk.of(sys.stderr, 2)
