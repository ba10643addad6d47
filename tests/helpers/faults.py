"""Faults at any step by which something becomes durable: `ckptvcs.store.disk` is where all go.

Steps       counts the steps of what runs inside, and does something before or after one of them
refused     runs something whose steps the operating system refuses
apart       runs something in a process of its own
PowerCut    what may be left on the disk when the power fails behind any of them
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

from ckptvcs.errors import CkptError
from ckptvcs.store import disk

T = TypeVar("T")

NAMES = ("create", "write", "sync", "link", "rename", "unlink", "sync_folder")
_HUNG = 20  # seconds, after which a process is one that waits for ever
_hung: list[bool] = []  # of all that were started
BEFORE, HALF, AFTER = "before", "half", "after"


@dataclass(frozen=True)
class Step:
    """One step: its operation, and what the path is that it is about."""

    operation: str
    kind: str

    def phases(self) -> tuple[str, ...]:
        """Where it can be cut."""
        return (BEFORE, HALF, AFTER) if self.operation == "write" else (BEFORE, AFTER)


def _path_of(arguments: tuple[Any, ...]) -> Path:
    first = arguments[0]
    if isinstance(first, Path):
        return first
    if isinstance(first.name, int):  # opened by its descriptor
        return Path(f"/proc/self/fd/{first.name}").readlink()
    return Path(first.name)


@contextmanager
def _patched(wrapped: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in NAMES:
            step = wrapped(name, getattr(disk, name))
            stack.enter_context(mock.patch.object(disk, name, step))
        yield


class Steps:
    """The steps of everything under `root`, in order.  At step `at` in phase `phase` it does what
    `fault` says.
    """

    def __init__(
        self,
        root: Path,
        at: int | None = None,
        phase: str = BEFORE,
        fault: Callable[[], None] = lambda: None,
        then: tuple[str, ...] = (),
    ) -> None:
        """`then` are the operations at which it is done again from then on."""
        self.seen: list[Step] = []
        self._root, self._at, self._phase, self._fault = root, at, phase, fault
        self._then = then

    def _kind(self, arguments: tuple[Any, ...]) -> str:
        """The folder of the repository that a step changes: for two paths, that of the second."""
        path = arguments[-1] if isinstance(arguments[-1], Path) else _path_of(arguments)
        below = path.relative_to(self._root).parts if path.is_relative_to(self._root) else ()
        return below[0] if below else "."

    def _wrapped(self, name: str, calm: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            number = len(self.seen)
            self.seen.append(Step(name, self._kind(arguments)))
            if self._at is not None and number > self._at and name in self._then:
                self._fault()
            hit = number == self._at
            # Threads take their steps in another order each time: this may be no write after all.
            whole = name != "write"
            if hit and (self._phase == BEFORE or (self._phase == HALF and whole)):
                self._fault()
            if hit and self._phase == HALF and not whole:
                file, data = arguments
                calm(file, memoryview(data)[: len(data) // 2])
                file.flush()
                self._fault()
            result = calm(*arguments)
            if hit and self._phase == AFTER:
                if name == "create":
                    result.close()
                self._fault()
            return result

        return step

    @contextmanager
    def taken(self) -> Iterator[Steps]:
        """Watch the steps of what runs inside."""
        with _patched(self._wrapped):
            yield self


def killed(root: Path, action: Callable[[], object], at: int, phase: str) -> bool:
    """Run `action` in a process of its own that is killed at a step; False where it ended first.

    A child of a process with threads may have inherited a lock that one of them held, and wait for
    ever: that is killed, too.  It has stopped at a step like any other.
    """
    child = os.fork()
    if child == 0:
        code = 9
        signal.alarm(_HUNG)
        try:
            fault = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            with Steps(root, at, phase, fault).taken():
                action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    _hung.append(hung)
    assert sum(_hung) <= 1 + len(_hung) // 200, "that is no accident of fork"
    ended = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert os.WIFSIGNALED(status) or ended, "the action failed by itself"
    return not ended


def apart(action: Callable[[], T]) -> T:
    """What `action` gives in a process of its own, whose limits are its own; what it raises too."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with open(writing, "wb", closefd=False) as pipe:
            try:
                done: tuple[Any, str | None] = (action(), None)
            except BaseException:
                done = (None, traceback.format_exc())
            pickle.dump(done, pipe)
            pipe.flush()
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123  a descriptor
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"it ended with {status}"
    result, problem = pickle.loads(answer)
    assert problem is None, problem
    return cast(T, result)


REFUSALS: tuple[BaseException, ...] = (
    *(
        OSError(code, os.strerror(code))
        for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
    ),
    KeyboardInterrupt(),
)
"""Why a step is not taken: the operating system does not want it, or the user."""


def refused(
    root: Path,
    action: Callable[[], object],
    at: int,
    phase: str,
    why: BaseException,
    *,
    lasting: bool,
) -> BaseException | None:
    """Run `action`, one of whose steps is refused; a `lasting` reason refuses all that follow: a
    full disk those that take room.  The error that it ends with, if it does.
    """

    def fault() -> None:
        raise type(why)(*why.args)

    full = isinstance(why, OSError) and why.errno in (errno.ENOSPC, errno.EDQUOT)
    then = tuple(name for name in NAMES if not full or name != "unlink") if lasting else ()
    with Steps(root, at, phase, fault, then).taken():
        try:
            action()
        except (CkptError, KeyboardInterrupt) as error:
            return error
    return None


def cuts(steps: list[Step], most: int, seed: int) -> list[tuple[int, str]]:
    """Where to cut: at each operation in each of its phases, one by chance, and at others too,
    `most` in all if there are so many.
    """
    places = [(n, phase) for n, step in enumerate(steps) for phase in step.phases()]
    random.Random(seed).shuffle(places)
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for place in places:
        first.setdefault((steps[place[0]].operation, place[1]), place)
    chosen = set(first.values())
    others = [place for place in places if place not in chosen]
    return sorted(chosen | set(others[: max(0, most - len(chosen))]))


# -- power cuts ------------------------------------------------------------------------------------


@dataclass
class _Content:
    """The bytes of a file, and how many of them are durable."""

    data: bytearray = field(default_factory=bytearray)
    durable: int = 0


@dataclass(frozen=True)
class _Change:
    """A name that came or went in a folder, by a rename perhaps two at once."""

    path: Path
    content: _Content | None


class PowerCut:
    """Records the steps of a run below `root`, and makes the states that a power cut behind any of
    them may leave: bytes that were not synced are lost, zeros or there; names whose folder was not
    synced are old or new, each by itself.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._events: list[tuple[str, tuple[Any, ...]]] = []

    def _recorded(self, name: str, calm: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            result = calm(*arguments)
            noted: tuple[Any, ...] = arguments
            if name in ("write", "sync"):
                noted = (Path(arguments[0].name), *(bytes(data) for data in arguments[1:]))
            if noted[0].is_relative_to(self._root):  # temporary folders are elsewhere
                self._events.append((name, noted))
            return result

        return step

    @contextmanager
    def recorded(self) -> Iterator[PowerCut]:
        """Record what runs inside."""
        with _patched(self._recorded):
            yield self

    def __len__(self) -> int:
        return len(self._events)

    def restore(self, before: Path, count: int, target: Path, seed: int) -> None:
        """Make at `target` what may be left of `root` when only the first `count` steps were taken
        and the power failed; `before` is what it was at the start.
        """
        draw = random.Random(seed)
        shutil.copytree(before, target, symlinks=True)
        open_files: dict[Path, _Content] = {}  # by the names that they have in memory
        pending: dict[Path, list[tuple[_Change, ...]]] = {}
        done: list[tuple[_Change, ...]] = []
        for name, arguments in self._events[:count]:
            path = arguments[0]
            if name == "create":
                open_files[path] = _Content()
                pending.setdefault(path.parent, []).append((_Change(path, open_files[path]),))
            elif name == "write":
                open_files[path].data += arguments[1]
            elif name == "sync":
                open_files[path].durable = len(open_files[path].data)
            elif name == "sync_folder":
                done += pending.pop(path, [])
            elif name == "unlink":
                open_files.pop(path, None)
                pending.setdefault(path.parent, []).append((_Change(path, None),))
            else:  # link, rename
                new = arguments[1]
                content = open_files.get(path) or self._old(before, path)
                open_files[new] = content
                changes = [_Change(new, content)]
                if name == "rename":
                    open_files.pop(path, None)
                    changes.append(_Change(path, None))
                pending.setdefault(new.parent, []).append(tuple(changes))
        left = [changes for rows in pending.values() for changes in rows]
        keep = draw.choice([0.0, 0.5, 1.0])
        done += [changes for changes in left if draw.random() < keep]
        for group in done:
            for change in group:
                self._put(target / change.path.relative_to(self._root), change.content, draw)

    def _old(self, before: Path, path: Path) -> _Content:
        data = (before / path.relative_to(self._root)).read_bytes()
        return _Content(bytearray(data), len(data))

    @staticmethod
    def _put(path: Path, content: _Content | None, draw: random.Random) -> None:
        if content is None:
            path.unlink(missing_ok=True)
            return
        lost = len(content.data) - content.durable
        data = bytes(content.data[: content.durable])
        fate = draw.choice(["lost", "zeros", "there", "part"]) if lost else "there"
        if fate == "zeros":
            data += bytes(lost)
        elif fate == "there":
            data = bytes(content.data)
        elif fate == "part":
            data = bytes(content.data[: content.durable + draw.randrange(lost)])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
