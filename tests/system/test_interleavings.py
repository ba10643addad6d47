"""Who deletes an original, lets an exact form fade, takes a commit back, sweeps: in every order of
their steps an original or its exact form stays.

The first part runs the code as it is, two and three actors of it, each stopped at each step.  The
second part takes the steps that docs/format.md, "Deletions", lists, on real refs and leases in
memory, which is fast enough for all orders of three.  One test holds the two parts together.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ckptvcs.encode.rekey import Rekeyer
from ckptvcs.errors import CkptError, ConflictError
from ckptvcs.files.removal import Originals
from ckptvcs.gc import collect
from ckptvcs.gc.fading import Fader, Patch
from ckptvcs.history.refs import Refs
from ckptvcs.ops import commit, originals, repository
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.originals import Keeper
from ckptvcs.repo import Repo
from ckptvcs.store import leases
from ckptvcs.store.backend import write_once
from ckptvcs.store.ids import ObjectId
from tests.helpers.crashing import save
from tests.helpers.faults import apart
from tests.helpers.memory_backend import MemoryBackend
from tests.helpers.orders import Actor, Stage, Taken, every_order, take

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
STEP = 2  # whose original is deleted

Make = Callable[[Path], dict[str, Callable[[], object]]]
Found = tuple[Taken, list[tuple[str, str]], str | None]


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    """Actors take turns in one thread: who waited for another one would wait for himself."""
    with leases.patience(0):
        yield


# -- the code as it is -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A repository with three commits, the newer two of which are exact, and an original."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ckpt-test-", dir=place) as folder:
        root = Path(folder) / "template"
        save(root, range(1, 6))
        apart(lambda: _build(root))
        yield root


def _build(folder: Path) -> None:
    repo = Repo.init(folder)
    for step in (1, 2, 3):
        repo.commit_path(folder / f"step-{step}.pt", message="")
    assert repo.entry(repo.resolve(STEP)).exact
    (folder / "in").mkdir()
    shutil.copy2(folder / f"step-{STEP}.pt", folder / "in")


def _delete(root: Path, name: ObjectId) -> Callable[[], object]:
    keeper = Keeper(handle(Repo.open(root)), None)

    def run() -> None:
        with keeper.removing(root / "in", accept_near=False) as remove:
            remove(name, f"step-{STEP}.pt")

    return run


def _commit(root: Path, step: int) -> Callable[[], object]:
    repo = Repo.open(root)
    return lambda: repo.commit_path(root / f"step-{step}.pt", message="")


def _undo(root: Path, times: int) -> Callable[[], object]:
    repo = Repo.open(root)
    return lambda: [repo.undo() for _ in range(times)]


def _gc(root: Path) -> Callable[[], object]:
    repo = Repo.open(root)
    return repo.gc


def _stopped(stage: Stage, *, every: bool) -> list[Any]:
    """The functions of the code before which actors stop."""
    publish = Refs.publish

    def moving(self: Refs, ref: str, *args: Any, **kwargs: Any) -> Any:
        stage.stop_at(f"publish {ref.partition('/')[0]}")
        return publish(self, ref, *args, **kwargs)

    delete = Fader.delete

    def fading(self: Fader, patches: Iterable[Patch]) -> None:
        patches = [*patches]
        stage.stop_at("delete patches" if patches else "delete nothing")
        delete(self, patches)

    points: list[tuple[Any, str, str]] = [
        (originals, "live_leases", "look for leases"),
        (originals, "turn", "turn"),
        (Originals, "delete", "delete the original"),
        (Rekeyer, "run", "rekey"),
        (collect.Collector, "record", "record"),
        (collect.Collector, "delete", "sweep"),
    ]
    if every:
        points += [
            (Keeper, "_reaching_ref", "look for a ref"),
            (Keeper, "is_exact", "prove"),
            (repository, "turn", "turn"),
            (collect.Collector, "plan", "plan"),
        ]
    fade = commit.Committer.fade
    patches: list[Any] = [
        mock.patch.object(where, name, stage.stopping(label, getattr(where, name)))
        for where, name, label in points
    ]
    patches += [
        mock.patch.object(Refs, "publish", moving),
        mock.patch.object(Fader, "delete", fading),
        mock.patch.object(commit.Committer, "fade", stage.stopping("look for pins", fade)),
        mock.patch.multiple(
            leases, GRACE=-1.0, MIN_TURN=0.0, _patience=ContextVar("none", default=0.0)
        ),
    ]
    return patches


def _played(
    template: Path,
    make: Callable[[Path], dict[str, Callable[[], object]]],
    first: Sequence[str],
    *,
    every: bool,
) -> Found:
    """Take one order, in a process of its own: the choices, the steps, and what is wrong then."""
    root = template.with_name(f"run-{os.getpid()}")
    shutil.copytree(template, root)
    want = (root / "in" / f"step-{STEP}.pt").read_bytes()
    actors = make(root)
    stage = Stage()
    patches = _stopped(stage, every=every)
    for patch in patches:
        patch.start()
    taken = stage.take(actors, first)
    for patch in patches:
        patch.stop()
    wrong = _wrong(root, want, stage)
    shutil.rmtree(root)
    return taken, stage.log, wrong


def _wrong(root: Path, want: bytes, stage: Stage) -> str | None:
    bad = [error for error in stage.errors.values() if not isinstance(error, CkptError)]
    if bad:
        return repr(bad[0])
    repo = Repo.open(root)
    kept = (root / "in" / f"step-{STEP}.pt").exists()
    steps = [label for _, label in stage.log]
    repo.gc()
    repo = Repo.open(root)
    damage = repo.verify().damage
    if damage:
        return str(damage)
    if kept:
        return None
    at = steps.index("delete the original")
    moves = [
        n
        for n, (actor, label) in enumerate(stage.log)
        if actor == "undo" and label == "publish heads"
    ]
    there = [entry for entry in repo.log(all_branches=True) if entry.step == STEP]
    if not there:
        back = all(at < move for move in moves[-1:]) and bool(moves)
        return None if back else "its commit was taken back before the original was deleted"
    repo.checkout_files(there[0].id, root / "back.pt")
    same = (root / "back.pt").read_bytes() == want
    return None if same else "the original is gone, and so is its exact form"


def _all(template: Path, make: Make, *, every: bool = NIGHTLY) -> list[Found]:
    found: list[Found] = []

    def run(first: Sequence[str]) -> Taken:
        found.append(apart(lambda: _played(template, make, first, every=every)))
        return found[-1][0]

    for _ in every_order(run):
        assert found[-1][2] is None, (found[-1][2], found[-1][1])
    return found


def _name(root: Path) -> ObjectId:
    return Repo.open(root).resolve(STEP)


def _deleted(found: Found) -> bool:
    return any(label == "delete the original" for _, label in found[1])


def _faded(found: Found) -> bool:
    return any(label == "delete patches" for _, label in found[1])


def _both(runs: list[Found]) -> bool:
    """Whether the original was deleted in some orders and stayed in others; none came twice."""
    assert len({tuple(choice for choice, _ in taken) for taken, _, _ in runs}) == len(runs)
    return len({_deleted(run) for run in runs}) == 2


@pytest.mark.slow
def test_a_commit_lets_the_exact_form_fade(template: Path) -> None:
    runs = _all(
        template, lambda root: {"keeper": _delete(root, _name(root)), "writer": _commit(root, 4)}
    )
    assert _both(runs)
    assert {_faded(run) for run in runs} == {True, False}


def test_the_commit_is_taken_back(template: Path) -> None:
    assert _both(
        _all(template, lambda root: {"keeper": _delete(root, _name(root)), "undo": _undo(root, 2)})
    )


def test_gc_comes_meanwhile(template: Path) -> None:
    assert _both(
        _all(template, lambda root: {"keeper": _delete(root, _name(root)), "gc": _gc(root)})
    )


@pytest.mark.slow
@pytest.mark.parametrize("third", ["undo", "gc", "pin"])
def test_three_at_once(third: str, template: Path) -> None:
    others: dict[str, Callable[[Path], Callable[[], object]]] = {
        "undo": lambda root: _undo(root, 3),
        "gc": _gc,
        "pin": lambda root: lambda: Repo.open(root).pin(_name(root), pinned=True),
    }
    runs = _all(
        template,
        lambda root: {
            "keeper": _delete(root, _name(root)),
            "writer": _commit(root, 4),
            third: others[third](root),
        },
        every=False,
    )
    assert _both(runs)


def test_the_code_takes_the_steps_of_the_model(template: Path) -> None:
    def steps(make: Callable[[Path], dict[str, Callable[[], object]]]) -> list[str]:
        _, log, wrong = apart(lambda: _played(template, make, [], every=True))
        assert wrong is None
        return [label for _, label in log]

    alone = World()
    assert steps(lambda root: {"keeper": _delete(root, _name(root))}) == ["begin", *KEEPER]
    assert alone.play({"keeper": keeper(alone)}) == [*KEEPER, "deleted"]
    code = steps(lambda root: {"writer": _commit(root, 4)})
    assert code == ["begin", *FADER]
    alone = World()
    assert alone.play({"writer": fader(alone)}) == ["record", *FADER]


# -- the model -------------------------------------------------------------------------------------


FIRST, SECOND, NEXT = (ObjectId(digit * 64) for digit in "123")
PATCH, RECORD, DROP = "packs/aa/patch", "meta/aa/fade", "meta/aa/drop"
KEEPER = [
    "look for a ref",
    "turn",
    "publish pins",
    "look for leases",
    "prove",
    "turn",
    "look for a ref",
    "delete the original",
]
FADER = ["publish heads", "look for pins", "delete patches"]


class World:
    """Two commits on a branch, the second of which is exact, if it is `patched` thanks to a patch;
    and its original.
    """

    def __init__(self, *, patched: bool = True) -> None:
        self.patched, self.taken = patched, Taken()
        self.backend = MemoryBackend()
        self.refs = Refs(self.backend)
        self.log: list[tuple[str, str]] = []
        self.original, self.swept = True, False
        for name in (FIRST, SECOND):
            self.move("heads/main", name)
        write_once(self.backend, PATCH, b"")

    def move(self, ref: str, commit: ObjectId | None) -> None:
        self.refs.publish(ref, self.refs.read(ref), commit=commit, time="t", action="move")

    def play(self, actors: Mapping[str, Actor], first: Sequence[str] = ()) -> list[str]:
        """Take one order; its steps."""
        self.taken = take(actors, first, self.log)
        return [label for _, label in self.log]

    def is_pinned(self) -> bool:
        return SECOND in self.refs.targets("pins")

    def is_led_to(self) -> bool:
        """Whether a branch leads to the second commit."""
        return self.refs.targets("heads") <= {SECOND, NEXT}

    def is_dropped(self) -> bool:
        return DROP in self.backend.files

    def drop(self) -> None:
        write_once(self.backend, DROP, b"")

    def is_whole(self) -> bool:
        """Whether the exact form is there."""
        return not self.swept and (PATCH in self.backend.files or not self.patched)

    def is_safe(self) -> bool:
        """Whether the original or the exact form is there; or somebody let the commit or its pin go
        after the original had been deleted.
        """
        if self.original or self.is_whole():
            return True
        steps = [label for _, label in self.log]
        gone = steps.index("deleted")
        return any(label in ("taken back", "unpinned", "dropped") for label in steps[gone:])


def keeper(world: World) -> Actor:
    """Deletes the original."""
    backend = world.backend
    with leases.lease(backend) as own:
        yield "look for a ref"
        if world.is_dropped() or not world.is_led_to():
            return
        if world.patched:
            yield from _pinned(world, own)
        yield "prove"
        if not world.is_whole():
            return
        yield "turn"
        with leases.turn(backend):
            yield "look for a ref"
            leases.check_lease(backend, own)
            if world.is_dropped() or not world.is_led_to() or world.is_pinned() < world.patched:
                return
            yield "delete the original"
            world.original = False
            yield "deleted"


def _pinned(world: World, own: str) -> Actor:
    """Pins the commit, and waits for those who may let the patch go yet."""
    backend = world.backend
    with leases.lease(backend):
        yield "turn"
        with leases.turn(backend):
            yield "publish pins"
            if not world.is_pinned():
                world.move(f"pins/{SECOND}", SECOND)
    yield "look for leases"
    others = [name for name in leases.live_leases(backend) if name != own]
    is_fading = RECORD in backend.files
    if others and is_fading and not leases.await_others(backend, others):
        raise ConflictError("somebody may let the patch go")


def fader(world: World) -> Actor:
    """A commit that lets the patch go."""
    backend = world.backend
    with leases.lease(backend) as own:
        yield "record"
        if not world.is_pinned() and RECORD not in backend.files:
            write_once(backend, RECORD, b"")
        is_recorded = RECORD in backend.files
        yield "publish heads"
        world.move("heads/main", NEXT)
        yield "look for pins"
        if world.is_pinned() or not is_recorded:
            return
        yield "delete patches"
        leases.check_lease(backend, own)
        backend.delete(PATCH)


def taker_back(world: World) -> Actor:
    """Takes the second commit back."""
    with leases.lease(world.backend):
        yield "turn"
        with leases.turn(world.backend):
            yield "move"
            world.move("heads/main", FIRST)
            yield "taken back"


def unpinner(world: World) -> Actor:
    """Takes the pin away."""
    with leases.lease(world.backend):
        yield "turn"
        with leases.turn(world.backend):
            yield "move"
            if world.is_pinned():
                world.move(f"pins/{SECOND}", None)
                yield "unpinned"


def sweeper(world: World, *, drops: bool = False) -> Actor:
    """Sweeps; drops the commit before, unless a pin keeps it."""
    with leases.exclusive(world.backend):
        yield "plan"
        if drops and not world.is_pinned():
            world.drop()
            yield "dropped"
        stays = world.is_pinned() or (world.is_led_to() and not world.is_dropped())
        fades = RECORD in world.backend.files and not world.is_pinned()
        yield "sweep"
        if not stays:
            world.swept = True
        if fades or not stays:
            world.backend.delete(PATCH)


def only(actor: Actor, steps: Set[str]) -> Actor:
    """An actor that stops at some of its steps only, and at what has to be seen in the log."""
    return (label for label in actor if label in steps)


_MADE: dict[str, Callable[[World], Actor]] = {
    "keeper": keeper,
    "second keeper": keeper,
    "writer": fader,
    "undo": taker_back,
    "unpin": unpinner,
    "gc": sweeper,
    "dropping gc": lambda world: sweeper(world, drops=True),
}
_SEEN = {"deleted", "taken back", "unpinned", "dropped"}
_COARSE = {
    "record",
    "publish pins",
    "look for leases",
    "delete the original",
    "look for pins",
    "delete patches",
    "move",
    "sweep",
    *_SEEN,
}
_FINE = {*_COARSE, "turn"}


def _orders(
    names: Sequence[str], steps: Set[str] | None, *, patched: bool = True
) -> tuple[int, int]:
    """How many orders there are, each of which leaves the world safe; how many delete the
    original.
    """
    count = deleted = 0

    def run(first: Sequence[str]) -> Taken:
        nonlocal count, deleted
        world = World(patched=patched)
        actors = {name: _MADE[name](world) for name in names}
        if steps is not None:
            actors = {name: only(actor, steps) for name, actor in actors.items()}
        world.play(actors, first)
        assert world.is_safe(), world.log
        assert [n for n in world.backend.files if n.startswith(("leases/", "marks/"))] == []
        count, deleted = count + 1, deleted + (not world.original)
        return world.taken

    with mock.patch.multiple(leases, GRACE=-1.0, MIN_TURN=0.0, POLL_INTERVAL=0.0):
        for _ in every_order(run):
            pass
    return count, deleted


_TWO = ["writer", "undo", "unpin", "gc", "dropping gc", "second keeper"]


@pytest.mark.parametrize("other", _TWO)
def test_every_order_of_two(other: str) -> None:
    count, deleted = _orders(
        ["keeper", other], None if NIGHTLY or other != "second keeper" else _COARSE
    )
    assert deleted > 0
    assert deleted < count or other == "second keeper"


_THREE = [
    ("writer", "undo"),
    ("writer", "unpin"),
    ("writer", "gc"),
    ("writer", "dropping gc"),
    ("undo", "gc"),
    ("undo", "dropping gc"),
    ("unpin", "gc"),
    ("unpin", "undo"),
]


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(pair, id=" and ".join(pair), marks=pytest.mark.slow if number % 4 else ())
        for number, pair in enumerate(_THREE)
    ],
)
def test_every_order_of_three(others: tuple[str, str]) -> None:
    count, deleted = _orders(["keeper", *others], _FINE if NIGHTLY else _COARSE)
    assert 0 < deleted < count


@pytest.mark.parametrize("others", [("undo",), ("undo", "gc"), ("undo", "dropping gc")])
def test_every_order_where_the_commit_needs_no_patch(others: tuple[str, ...]) -> None:
    count, deleted = _orders(["keeper", *others], None, patched=False)
    assert 0 < deleted < count


def test_the_model_notices_a_fader_that_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(world: World) -> Actor:
        with leases.lease(world.backend):
            yield "record"
            write_once(world.backend, RECORD, b"")
            yield "delete patches"
            world.backend.delete(PATCH)

    monkeypatch.setitem(_MADE, "writer", careless)
    with pytest.raises(AssertionError):
        _orders(["keeper", "writer"], None)


def test_the_model_notices_a_keeper_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "await_others", lambda *_: True)
    with pytest.raises(AssertionError):
        _orders(["keeper", "writer"], None)


def test_the_model_notices_one_who_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(world: World) -> Actor:
        with leases.lease(world.backend):
            yield "move"
            world.move("heads/main", FIRST)
            yield "taken back"

    monkeypatch.setitem(_MADE, "undo", hasty)
    with pytest.raises(AssertionError):
        _orders(["keeper", "undo", "gc"], None, patched=False)
