"""The test's end of a server: runs commands in it, one of whose calls is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from errno import (
    EACCES,
    EAGAIN,
    EDQUOT,
    EINTR,
    EIO,
    EMFILE,
    ENFILE,
    ENOLCK,
    ENOMEM,
    ENOSPC,
    EROFS,
    errorcode,
)
from pathlib import Path
from typing import Any, Self

import pytest

from tests.helpers.command_line import environment

HALF = -1  # a call that does half of what it was to do

ERRORS: dict[str, tuple[int, ...]] = {
    "open": (EIO, ENOSPC, EINTR, EMFILE, ENFILE, ENOMEM, EACCES),
    "read": (EIO, EINTR, HALF),
    "pread": (EIO, EINTR, EAGAIN, HALF),
    "write": (EIO, ENOSPC, EINTR, EAGAIN, EDQUOT, HALF),
    "pwrite": (EIO, ENOSPC, EINTR, EAGAIN, EDQUOT, HALF),
    "writev": (EIO, ENOSPC, EINTR, EAGAIN),
    "fsync": (EIO, ENOSPC, EINTR),
    "fdatasync": (EIO, ENOSPC, EINTR),
    "msync": (EIO,),
    "rename": (EIO, ENOSPC, ENOMEM, EROFS),
    "link": (EIO, ENOSPC, ENOMEM, EROFS),
    "unlink": (EIO, ENOMEM, EROFS),
    "mkdir": (EIO, ENOSPC, ENOMEM, EROFS),
    "rmdir": (EIO, ENOMEM),
    "ftruncate": (EIO, EINTR, ENOSPC),
    "fallocate": (EIO, EINTR, ENOSPC),
    "mmap": (EAGAIN, ENOMEM, ENFILE),
    "stat": (EIO, ENOMEM, EACCES),
    "opendir": (EIO, EMFILE, ENOMEM, EACCES),
    "readdir": (EIO,),
    "lock": (EAGAIN, EINTR, ENOLCK),
    "thread": (EAGAIN,),
    "fork": (EAGAIN, ENOMEM),
    "pipe": (EMFILE, ENFILE),
    "dup": (EMFILE, EINTR),
    "close": (EIO, EINTR, ENOSPC),
    "random": (EINTR, EAGAIN),
    "memory": (EMFILE, ENOMEM),
    "utime": (EIO, EACCES),
    "readlink": (EIO, ENOMEM),
}
"""What each kind of call may fail with, by the manual; in the order of refusing.c.  A read that has
to wait (EAGAIN) needs a descriptor that does not: those are read by `pread`.
"""

KINDS = tuple(ERRORS)


@dataclass(frozen=True)
class Refusal:
    """The call that is refused: the Nth of its kind, and what with; one that `lasts` stays."""

    kind: str
    number: int
    error: int
    lasts: bool = False

    def __str__(self) -> str:
        how = "half" if self.error == HALF else errorcode[self.error]
        return f"{self.kind} {self.number} {how}{' from then on' if self.lasts else ''}"


@dataclass(frozen=True)
class Ran:
    """A command that has ended; `hit` is the file of the call that was refused, None if there was
    none; `calls` are all that it made, if that was asked for: kind and file of each.
    """

    code: int
    out: str
    err: str
    hit: str | None
    calls: tuple[tuple[str, str], ...]


def library(folder: Path) -> Path:
    """refusing.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("calls can be refused where there is Linux and a C compiler")
    made, source = folder / "refusing.so", Path(__file__).with_name("refusing.c")
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", made, source, "-ldl"], check=True)
    return made


class Server:
    """A process that runs commands."""

    def __init__(self, made: Path) -> None:
        env = environment() | {"LD_PRELOAD": str(made), "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.refusing.server"],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(
        self,
        folder: Path,
        *args: str,
        refusal: Refusal | None = None,
        record: bool = False,
        learn: Path | None = None,
    ) -> Ran:
        """Run `ckpt ARGS` in a folder; by way of a file to `learn` from, the server has loaded from
        then on what that loads.
        """
        kind, number, error, lasts = -1, 0, 0, False
        if refusal is not None:
            kind, number = KINDS.index(refusal.kind), refusal.number
            error, lasts = refusal.error, refusal.lasts
        answer = self._ask(
            folder=str(folder),
            args=args,
            kind=kind,
            number=number,
            error=error,
            lasts=lasts,
            record=record,
            learn=str(learn or ""),
        )
        calls = tuple((KINDS[kind], path) for kind, path in answer["calls"])
        return Ran(answer["code"], answer["out"], answer["err"], answer["hit"], calls)

    def call(self, name: str, *args: object) -> Any:
        """What a function of `looking` gives, in a process of its own."""
        answer = self._ask(function=name, args=[str(arg) for arg in args])
        assert answer["problem"] is None, answer["problem"]
        return answer["result"]


def site(kind: str, path: str, root: Path) -> str:
    """What a call is about: its kind, and its file without what is different each time."""
    name = path.replace(str(root), "ROOT").removesuffix(" (deleted)")
    return f"{kind} {re.sub(r'[0-9a-f]{8,}|[0-9]+', '#', name)}"
