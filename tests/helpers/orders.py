"""Every order in which the steps of several actors can be taken.

Actors are generators, each of which is at a step when it yields; or code that runs as it is in
threads, where `Stage` stops a thread before each of some functions.  An order that is cut short
by an actor that gives up is tried as it comes: nothing has to be known of it before.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from ckptvcs.errors import CkptError

Actor = Generator[str, None, None]
Taken = list[tuple[str, list[str]]]
"""The choices of a run, each with all actors that could have been chosen."""

_PATIENCE = 120  # seconds, after which a thread waits for ever


def every_order(run: Callable[[Sequence[str]], Taken]) -> Iterator[list[str]]:
    """Run all orders; `run` takes the first choices, and goes on with whom it likes."""
    stack: list[list[str]] = [[]]
    while stack:
        first = stack.pop()
        taken = run(first)
        yield [name for name, _ in taken]
        for at in range(len(first), len(taken)):
            choice, able = taken[at]
            before = [name for name, _ in taken[:at]]
            stack += [[*before, other] for other in able if other != choice]


def take(
    actors: Mapping[str, Actor], first: Sequence[str], log: list[tuple[str, str]] | None = None
) -> Taken:
    """Run generators in an order; what they do at each step comes into the `log`.  One that raises
    CkptError has given up.
    """
    left, taken = dict(actors), Taken()
    while left:
        able = sorted(left)
        choice = first[len(taken)] if len(taken) < len(first) else able[0]
        taken.append((choice, able))
        try:
            label = next(left[choice])
        except (StopIteration, CkptError):
            del left[choice]
        else:
            if log is not None:
                log.append((choice, label))
    return taken


class Stage:
    """Runs code in threads, one at a time, from step to step.  `log` has each step that was begun:
    the actor, and what it does.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.errors: dict[str, BaseException] = {}
        self._go: dict[str, threading.Semaphore] = {}
        self._reports: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def stop_at(self, label: str) -> None:
        """Wait until it is this thread's turn; nothing where it is no actor's."""
        name = threading.current_thread().name
        if name in self._go:
            self._reports.put((name, label))
            self._go[name].acquire()

    def stopping(self, label: str, calm: Callable[..., Any]) -> Callable[..., Any]:
        """A function before which its caller waits."""

        @functools.wraps(calm)
        def stopped(*args: Any, **kwargs: Any) -> Any:
            self.stop_at(label)
            return calm(*args, **kwargs)

        return stopped

    def take(self, actors: Mapping[str, Callable[[], object]], first: Sequence[str]) -> Taken:
        """Run actors in an order, to the end."""
        taken: Taken = []
        labels = dict.fromkeys(actors, "begin")
        for name, action in actors.items():
            self._go[name] = threading.Semaphore(0)
            threading.Thread(target=self._run, args=(name, action), name=name, daemon=True).start()
        while labels:
            able = sorted(labels)
            choice = first[len(taken)] if len(taken) < len(first) else able[0]
            taken.append((choice, able))
            self.log.append((choice, labels[choice]))
            self._go[choice].release()
            name, label = self._reports.get(timeout=_PATIENCE)
            assert name == choice
            if label is None:
                del labels[name]
            else:
                labels[name] = label
        return taken

    def _run(self, name: str, action: Callable[[], object]) -> None:
        self._go[name].acquire()
        try:
            action()
        except BaseException as error:
            self.errors[name] = error
        self._reports.put((name, None))
