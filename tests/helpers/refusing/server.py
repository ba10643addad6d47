"""A process that has loaded the program, and forks a child for each command: so none has to start.

It loads nothing that the command line does not load, torch above all, and has no threads.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.refusing import looking

_HUNG = 30  # seconds
_KINDS, _PATH, _RECORDS = 30, 120, 1 << 15


class _Record(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("path", ctypes.c_char * _PATH)]


class _Shared(ctypes.Structure):
    _fields_ = [
        ("counts", ctypes.c_long * _KINDS),
        ("hits", ctypes.c_int),
        ("hit", ctypes.c_char * _PATH),
        ("recorded", ctypes.c_long),
        ("records", _Record * _RECORDS),
    ]


def _load(names: list[str]) -> None:
    """Load what a command has loaded in a child."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(ImportError, ValueError):  # some are made, not found
                import_module(name)


def _run(request: dict[str, Any], own: Any) -> NoReturn:
    """In the child: be the command, to the end of the interpreter."""
    from ckptvcs.__main__ import main

    out, err = request["out"], request["err"]
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    if request["learn"]:
        atexit.register(lambda: Path(request["learn"]).write_text(json.dumps(sorted(sys.modules))))
    sys.argv = ["ckpt", *request["args"]]
    own.refusing_arm(
        request["kind"],
        ctypes.c_long(request["number"]),
        request["error"],
        int(request["lasts"]),
        int(request["record"]),
    )
    main()
    raise SystemExit(0)


def _ended(child: int) -> int:
    """The exit code of a child; one that hangs is killed."""

    def kill(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(_HUNG)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status)


def _call(request: dict[str, Any], writing: int) -> NoReturn:
    answer: dict[str, Any] = {"result": None, "problem": None}
    try:
        answer["result"] = getattr(looking, request["function"])(*request["args"])
    except BaseException:
        answer["problem"] = traceback.format_exc()
    with os.fdopen(writing, "w", closefd=False) as pipe:
        json.dump(answer, pipe)
    os._exit(0)


def _lines(number: int) -> Iterator[str]:
    """The lines that come in by a descriptor, which no object owns: a child closes it."""
    text = b""
    while data := os.read(number, 1 << 16):
        text += data
        *lines, text = text.split(b"\n")
        yield from (line.decode() for line in lines)


def _read(number: int) -> str:
    """A file in memory from its start, which is closed then."""
    data = os.pread(number, os.fstat(number).st_size, 0)
    os.close(number)
    return data.decode("utf-8", "replace")


def serve() -> None:
    """Answer requests, a line each, until there are no more."""
    own = ctypes.CDLL(None)
    own.refusing_shared.restype = ctypes.POINTER(_Shared)
    shared = own.refusing_shared().contents
    asked, answers = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    from ckptvcs.cli.app import COMMANDS, load

    for command in COMMANDS:
        load(command)
    for line in _lines(asked):
        request = json.loads(line)
        if "function" in request:
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                _call(request, writing)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                text = pipe.read()
            _ended(child)
            os.write(answers, text.encode() + b"\n")
            continue
        out, err = os.memfd_create("out"), os.memfd_create("err")
        shared.counts[:] = [0] * _KINDS
        shared.hits = shared.recorded = 0
        child = os.fork()
        if child == 0:
            os.close(asked)
            os.close(answers)
            _run(request | {"out": out, "err": err}, own)
        code = _ended(child)
        if request["learn"]:
            _load(json.loads(Path(request["learn"]).read_text()))
        rows = shared.records[: min(shared.recorded, _RECORDS)] if request["record"] else ()
        answer = {
            "code": code,
            "out": _read(out),
            "err": _read(err),
            "hit": shared.hit.decode("utf-8", "replace") if shared.hits else None,
            "calls": [[row.kind, row.path.decode("utf-8", "replace")] for row in rows],
        }
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
