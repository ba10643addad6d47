"""What others save while a file is made stays, and nothing is written elsewhere, whatever they do
before whichever call to the system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import CkptError, ConflictError
from ckptvcs.files import placing
from ckptvcs.files.placing import Folder
from ckptvcs.files.removal import Originals
from ckptvcs.files.targets import Targets
from ckptvcs.ops.average import average
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store import renaming
from ckptvcs.store.ids import ObjectId

OURS, THEIRS, OLD = b"ours" * 50, b"an hour of work of another program", b"old bytes" * 7
Act = Callable[[], object]
CALLS = (
    "open",
    "stat",
    "fstat",
    "mkdir",
    "link",
    "symlink",
    "rename",
    "replace",
    "unlink",
    "fchmod",
    "utime",
    "dup",
)


class World:
    """The system as `placing` sees it: before the n-th call something else happens, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.at = -1
        self.act: Act = _nothing
        self._rename = renaming.rename
        monkeypatch.setattr(placing, "os", self)
        monkeypatch.setattr(placing, "rename", self.rename_flags)

    def _before(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self.at + 1:
            self.act()

    def rename_flags(self, folder: int, old: str, new: str, how: str) -> bool:
        self._before(how)
        return self._rename(folder, old, new, how)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self._before(name)
            return real(*args, **options)

        return call


def _nothing() -> None:
    pass


@pytest.fixture(params=["as it is", "no renames with flags", "no links either"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "as it is":
        monkeypatch.setattr(placing, "rename", lambda *_: False)
    if request.param == "no links either":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    return str(request.param)


def write(target: Path) -> None:
    with Targets() as looks:
        place = looks.look(target)
        with place.file(mode=0o640) as out:
            out.write(OURS)


def save_anew(target: Path) -> Act:
    """As trainers save."""

    def act() -> None:
        beside = target.with_name("theirs.tmp")
        beside.write_bytes(THEIRS)
        beside.replace(target)

    return act


def save_in_place(target: Path) -> Act:
    return lambda: target.write_bytes(THEIRS)


def same_size(target: Path) -> Act:
    return lambda: target.write_bytes(THEIRS[:1] * len(OLD))


def save_and_forget(target: Path) -> Act:
    def act() -> None:
        save_anew(target)()
        target.unlink()

    return act


def make_folder(target: Path) -> Act:
    def act() -> None:
        target.unlink(missing_ok=True)
        target.mkdir()
        (target / "kept").write_bytes(THEIRS)

    return act


def make_link(target: Path) -> Act:
    def act() -> None:
        target.unlink(missing_ok=True)
        target.symlink_to(target.parent.parent / "elsewhere")

    return act


ACTS = [save_anew, save_in_place, same_size, save_and_forget, make_folder, make_link]


def state(target: Path) -> object:
    """What is at a name."""
    if target.is_symlink():
        return "->", str(target.readlink())
    if target.is_dir():
        return sorted((path.name, path.read_bytes()) for path in target.iterdir())
    return target.read_bytes() if target.exists() else None


@pytest.mark.parametrize("there", [False, True], ids=["free", "taken"])
@pytest.mark.parametrize("act", ACTS)
def test_what_others_do_before_any_call_stays(
    act: Callable[[Path], Act],
    there: bool,
    system: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)

    def prepare(number: int) -> Path:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "elsewhere").mkdir()
        target = folder / "in" / "model.pt"
        target.parent.mkdir()
        if there:
            target.write_bytes(OLD)
        world.calls, world.at = [], number
        return target

    write(prepare(-1))
    total, reached = len(world.calls), set()
    for number in range(total):
        target = prepare(number)
        done: list[object] = []

        def happen(target: Path = target, done: list[object] = done) -> None:
            act(target)()
            done.append(state(target))

        world.act = happen
        with contextlib.suppress(CkptError):
            write(target)
            done.append("written")
        if not done or done[0] == "written":
            continue
        reached.add(world.calls[number])
        if world.calls[number] in ("exchange", "replace") and system != "as it is":
            continue  # the moment that is left where the system can do no better
        looked = world.calls[:number].count("stat") > 0
        assert not list((target.parent.parent / "elsewhere").iterdir())
        left = [path for path in target.parent.iterdir() if path != target]
        assert all(path.name.startswith(".ckpt-") for path in left)
        if looked and act is not save_and_forget:
            assert state(target) == done[0], (number, world.calls)
        if not looked:
            # It was there when the look came; a file is meant to be replaced then.
            assert state(target) in (OURS, done[0])
        assert not any(path.is_file() and path.read_bytes() == OURS for path in left)
    assert {"open", "stat"} <= reached
    assert total > 5


def test_a_free_name_is_taken_and_a_seen_file_replaced(system: str, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model.pt"
    for _ in range(2):
        write(target)
        assert target.read_bytes() == OURS
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        assert [path.name for path in target.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("call", ["fstat", "stat", "unlink", "rename"])
def test_a_call_that_is_refused_once_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, calls, refused = getattr(os, call), 0, 0

    def refuse(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return calm(*args, **options)

    def end() -> None:
        expected = contextlib.suppress(ZeroDivisionError, OSError, CkptError)
        with expected, Targets() as looks, looks.look(tmp_path / "model.pt").file() as out:
            out.write(OURS[: 1 // 0])

    reached = True
    while reached:
        calls, refused = 0, refused + 1
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            end()
        reached = calls >= refused
        assert list(tmp_path.iterdir()) == [], (call, refused)
    assert refused > 1 or call == "rename"


def test_an_error_while_it_is_made_leaves_all_as_it_was(system: str, tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    target.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), Targets() as looks, looks.look(target).file() as out:
        out.write(OURS[: 1 // 0])
    assert target.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_saved_again_while_it_is_put_back_is_the_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in the same moment: the later one has the name, the other is not deleted."""
    target, real = tmp_path / "model.pt", renaming.rename
    turn: list[str] = []
    target.write_bytes(OLD)

    def rename(folder: int, old: str, new: str, how: str) -> bool:
        if how == renaming.EXCHANGE and len(turn) < 2:
            turn.append(how)
            beside = tmp_path / "theirs.tmp"
            beside.write_bytes(THEIRS + bytes([len(turn)]))
            beside.replace(target)
        return real(folder, old, new, how)

    monkeypatch.setattr(placing, "rename", rename)
    with pytest.raises(ConflictError, match="several times") as caught:
        write(target)
    assert target.read_bytes() == THEIRS + b"\2"
    (kept,) = [path for path in tmp_path.iterdir() if path != target]
    assert kept.read_bytes() == THEIRS + b"\1"
    assert str(kept) in str(caught.value.hint)


# -- removal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [save_anew, save_in_place, make_link])
def test_an_original_that_is_saved_anew_is_not_removed(
    act: Callable[[Path], Act], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blake3 import blake3

    world, reached = World(monkeypatch), set()
    digest = blake3(OLD).hexdigest()
    for number in range(30):
        folder = tmp_path / str(number) / "in"
        folder.mkdir(parents=True)
        target = folder / "model.pt"
        target.write_bytes(OLD)
        done: list[object] = []

        def happen(target: Path = target, done: list[object] = done) -> None:
            if target.exists():  # else it is gone already, and this one is new
                act(target)()
                done.append(state(target))

        world.calls, world.at, world.act = [], number, happen
        with Originals(folder) as originals, contextlib.suppress(CkptError):
            originals.remove(PurePosixPath("model.pt"), digest, lambda _: None)
        if done:
            reached.add(world.calls[number])
            assert state(target) == done[0], (number, world.calls)
    assert "rename" in reached


@pytest.mark.parametrize("act", ["remove", "replace"])
def test_a_file_that_cannot_be_looked_at_any_more_keeps_its_name(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.pt").write_bytes(OLD)
    look, refused = Folder.look, list[str]()

    with Folder.open(tmp_path) as folder:
        seen = folder.look("model.pt")
        assert seen is not None

        def refuse(self: Folder, name: str) -> Any:
            found = look(self, name)
            moved = name.startswith(".ckpt-") and found is not None and found.st_ino == seen.st_ino
            if moved and not refused:
                refused.append(name)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return found

        monkeypatch.setattr(Folder, "look", refuse)

        def replace() -> None:
            with folder.file("model.pt", seen) as out:
                out.write(OURS)

        acts = {"remove": lambda: folder.remove("model.pt", seen), "replace": replace}
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            acts[act]()
    assert refused
    assert (tmp_path / "model.pt").read_bytes() == OLD
    assert os.listdir(tmp_path) == ["model.pt"]  # noqa: PTH208


# -- whole commands --------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> tuple[Repo, str, Path]:
    folder = tmp_path / "ck"
    (folder / "sub" / "deep").mkdir(parents=True)
    for number in range(3):
        (folder / f"sub/f{number}.dat").write_bytes(os.urandom(300))
        (folder / f"sub/deep/f{number}.dat").write_bytes(os.urandom(300))
    (folder / "sub" / "link").symlink_to("f0.dat")
    repo = Repo.init(tmp_path / "r", codec="lossless")
    return repo, repo.commit_path(folder, message="", raw=True).id, folder


WRITERS: dict[str, Callable[[Repo, Any, Path], object]] = {
    "checkout": lambda repo, name, target: repo.checkout_files(name, target),
    "checkout --force": lambda repo, name, target: repo.checkout_files(name, target, force=True),
    "export": lambda repo, name, target: PartReader(handle(repo).restorer(name)).export(
        target, None, lambda _: None
    ),
    "average": lambda repo, name, target: average(
        handle(repo).catalog, [name], None, target, lambda _: None, force=True
    ),
}


@pytest.mark.parametrize(
    "swapped", ["sub", *(pytest.param(name, marks=pytest.mark.slow) for name in (".", "sub/deep"))]
)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_becomes_a_link_before_any_call(
    writer: str,
    swapped: str,
    directory: tuple[Repo, str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo, name, folder = directory
    world, outside = World(monkeypatch), tmp_path / "outside"
    (outside / "sub" / "deep").mkdir(parents=True)
    (outside / "deep").mkdir()
    before = sorted(outside.rglob("*"))

    def prepare(number: int) -> Path:
        target = tmp_path / "t" / str(number)
        shutil.copytree(folder, target, symlinks=True)
        world.calls, world.at = [], number
        return target

    WRITERS[writer](repo, name, prepare(-1))
    total, happened = len(world.calls), 0
    for number in range(total):
        target = prepare(number)

        def swap(place: Path = target / swapped) -> None:
            nonlocal happened
            happened += 1
            place.rename(tmp_path / "t" / f"moved{happened}")
            place.symlink_to(outside)

        world.act = swap
        with contextlib.suppress(CkptError):
            WRITERS[writer](repo, name, target)
        assert sorted(outside.rglob("*")) == before, (number, world.calls[: number + 1])
    assert happened > 30


def while_decoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[int]:
    """Do something once, when the first bytes are written."""
    from ckptvcs.decode.commit_reader import Restorer

    real = Restorer.read_slices
    times: list[int] = []

    def slices(self: Restorer, *args: Any, **options: Any) -> Iterator[Any]:
        if not times:
            times.append(1)
            act()
        return real(self, *args, **options)

    monkeypatch.setattr(Restorer, "read_slices", slices)
    return times


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    import torch

    repo = Repo.init(tmp_path, codec="lossless")
    for step in (1, 2):
        torch.save({"model": {"w": torch.full((1000,), float(step))}}, tmp_path / "m.pt")
        repo.commit_path(tmp_path / "m.pt", message="", step=step)
    (tmp_path / "m.pt").unlink()
    return repo


COMMANDS = {
    "checkout": ("checkout", "1"),
    "checkout -o": ("checkout", "1", "-o", "m.pt"),
    "checkout --force": ("checkout", "1", "--force"),
    "checkout --only": ("checkout", "1", "--only", "model", "-o", "m.pt"),
    "export": ("export", "1", "m.pt"),
    "export --force": ("export", "1", "m.pt", "--force"),
    "export --only": ("export", "1", "m.pt", "--only", "model"),
    "export --all": ("export", "--all", "."),
    "cat pt": ("cat", "1:w", "-o", "m.pt"),
    "cat npy": ("cat", "1:w", "-o", "m.npy"),
    "cat safetensors": ("cat", "1:w", "-o", "m.safetensors"),
    "average": ("average", "1..2", "-o", "m.pt"),
    "average --force": ("average", "1..2", "-o", "m.pt", "--force"),
}


@pytest.mark.parametrize("there", [False, True], ids=["free", "taken"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_saved_while_a_command_decodes_stays(
    command: str, there: bool, run: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from ckptvcs.cli.app import app

    args = COMMANDS[command]
    target = tmp_path / next((arg for arg in args if arg.startswith("m.")), "m.pt")
    if command == "export --all":
        target = tmp_path / "step-1.pt"
    monkeypatch.chdir(tmp_path)
    if there:
        run.checkout_files(run.resolve(2), target)
        if args[0] != "checkout" and "--force" not in args:
            args = (*args, "--force")
        if "--only" in args:
            args = (*args, "--force")
    times = while_decoding(monkeypatch, save_anew(target))
    done = CliRunner().invoke(app, list(args))
    assert times, "it decoded nothing"
    assert target.read_bytes() == THEIRS
    assert done.exit_code == ConflictError.exit_code, done.output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".ckpt-")]


def test_a_commit_names_no_way_through_a_link(tmp_path: Path) -> None:
    """Its own path is not the user's word; with -o it is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "runs").symlink_to("real")
    repo = Repo.init(tmp_path, codec="lossless")
    (tmp_path / "runs" / "m.dat").write_bytes(OURS)
    made = repo.commit_path(tmp_path / "runs" / "m.dat", message="")
    (tmp_path / "real" / "m.dat").unlink()
    with pytest.raises(CkptError, match="symbolic link") as caught:
        repo.checkout_files(made.id, force=True)
    assert "-o" in str(caught.value.hint)
    repo.checkout_files(made.id, tmp_path / "runs" / "m.dat")
    assert (tmp_path / "real" / "m.dat").read_bytes() == OURS


def test_a_part_of_a_commit_stays_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--only` without -o goes where the commit says, which may be anything."""
    import dataclasses

    import torch
    from typer.testing import CliRunner

    from ckptvcs.cli.app import app
    from ckptvcs.history.commit import dump_commit

    monkeypatch.setattr(
        "ckptvcs.ops.describe.dump_commit",
        lambda made: dump_commit(dataclasses.replace(made, path="../../x")),
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    Repo.init(".").commit({"model": {"w": torch.ones(1000)}}, step=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    for args in (["checkout", "1"], ["checkout", "1", "--only", "model"], ["status"]):
        assert CliRunner().invoke(app, args).exit_code == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_files_that_are_one_by_hard_links_are_replaced_each(
    directory: tuple[Repo, str, Path], tmp_path: Path
) -> None:
    repo, name, folder = directory
    target = tmp_path / "target"
    shutil.copytree(folder, target, symlinks=True)
    (target / "sub" / "f1.dat").unlink()
    os.link(target / "sub" / "f0.dat", target / "sub" / "f1.dat")
    repo.checkout_files(ObjectId(name), target)
    for path in folder.rglob("*.dat"):
        assert (target / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_many_targets_hold_one_folder_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with Targets() as looks:
        targets = [looks.look(tmp_path / "new" / f"{number}.pt") for number in range(500)]
        assert len(list(descriptors.iterdir())) - before <= 2
        for target in targets[:3]:
            with target.file() as out:
                out.write(OURS)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["0.pt", "1.pt", "2.pt"]


def test_folders_are_entered_by_names_that_are_no_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    with Folder.open(tmp_path) as top:
        top.enter("a").close()
        with pytest.raises(OSError, match="b") as caught:
            top.enter("b")
        assert caught.value.errno == errno.ELOOP
        for way in ("/a", "../a", "a/../a"):
            with pytest.raises(CkptError), top.inside(PurePosixPath(way)):
                pass
