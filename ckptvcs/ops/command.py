"""A command of the user that is run on checked-out commits, for `bisect` and `each`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any

from ckptvcs.errors import CkptError, InvalidInputError
from ckptvcs.files.names import safe_path
from ckptvcs.history.log import LogEntry

_MOST_OUTPUT = 1 << 20  # bytes at the end of the output of a command that are searched
_BLOCK = 1 << 16
_LOOK = 100  # milliseconds between looks whether a silent command has ended
_STDERR = 2
_PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
_PLACEHOLDER = re.compile(r"\{(|step|id)\}")


def file_name(entry: LogEntry) -> str:
    """Return the committed name of a file or folder, without its path."""
    path = entry.commit.path
    return "checkpoint" if path == "." else safe_path(path).name


def fill(command: Sequence[str], entry: LogEntry, path: Path) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment of a command for a commit checked out to `path`.

    In the arguments, the path replaces `{}`, the step `{step}` and the id `{id}`.  Without any of
    these, the path is the last argument.
    """
    values = {"": str(path), "step": "" if entry.step is None else str(entry.step), "id": entry.id}
    arguments = [_PLACEHOLDER.sub(lambda found: values[found[1]], part) for part in command]
    if arguments == list(command):
        arguments.append(str(path))
    variables = {"CKPT_STEP": values["step"], "CKPT_COMMIT": entry.id, "CKPT_PATH": str(path)}
    return arguments, os.environ | variables


class MetricCommand:
    """A command that is run on commits, and prints metrics as a line of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises InvalidInputError if the program does not exist."""
        program = next(iter(command), "")
        if not program or ("{" not in program and shutil.which(program) is None):
            raise InvalidInputError(
                f"cannot run '{program}': no such program", hint="pass a command after '--'"
            )
        self._command = list(command)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._is_stopped = False

    def __call__(self, entry: LogEntry, path: Path) -> dict[str, float]:
        """Run the command, and return the metrics that it printed.

        Raises:
            CkptError: The command cannot be run, or fails.
        """
        process = self._start(*fill(self._command, entry, path))
        assert process.stdout is not None
        try:
            output = _relay(process, process.stdout)
            code = process.wait()
        except BaseException:
            _end([process])
            raise
        finally:
            with self._lock:
                self._running.discard(process)
            process.stdout.close()
        if code:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise CkptError(f"the command {how}")
        return printed_metrics(output)

    def _start(self, arguments: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._is_stopped:
                raise CkptError("the command was stopped")
            try:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    env=variables,
                    process_group=0,  # `stop` ends its children, too
                )
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise CkptError(f"cannot run '{arguments[0]}': {reason}") from error
            self._running.add(process)
        return process

    def stop(self) -> None:
        """End all running commands."""
        with self._lock:
            self._is_stopped = True
            running = [*self._running]
        _end(running)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and their children, at first politely."""
    for process in processes:
        _kill(process, signal.SIGTERM)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        _kill(process, signal.SIGKILL)
        process.wait()


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # all of the group have ended
        os.killpg(process.pid, number)


def _relay(process: subprocess.Popen[bytes], pipe: IO[bytes]) -> bytes:
    """Copy the output of a command to stderr until it ends, and return the end of the output."""
    end, look = b"", select.poll()
    look.register(pipe, select.POLLIN)
    while True:
        is_ended = process.poll() is not None  # a child of the command may keep the pipe open
        if not look.poll(0 if is_ended else _LOOK):
            if is_ended:
                return end
            continue
        block = os.read(pipe.fileno(), _BLOCK)
        if not block:
            return end
        end = (end + block)[-_MOST_OUTPUT:]
        with contextlib.suppress(OSError):  # nobody may read stderr any more
            os.write(_STDERR, block)


def printed_metrics(output: bytes) -> dict[str, float]:
    """Return the numbers in the last line of an output that is a JSON object with numbers."""
    for line in reversed(output.splitlines()):
        if line.strip().startswith(b"{"):
            with contextlib.suppress(ValueError, RecursionError):
                numbers = _numbers(json.loads(line))
                if numbers:
                    return numbers
    return {}


def _numbers(value: Any) -> dict[str, float]:
    numbers = {}
    for name, number in value.items() if isinstance(value, dict) else ():
        if name and isinstance(number, int | float) and not isinstance(number, bool):
            with contextlib.suppress(OverflowError):
                numbers[name] = float(number)
    return numbers
