"""Who holds a lease: this process, another one, one that is gone, a copy, another machine."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from ckptvcs import parallel
from ckptvcs.errors import BusyError, ConflictError
from ckptvcs.store import disk, holders, host, lease_files, leases, local
from ckptvcs.store.holders import Holder
from ckptvcs.store.leases import check_lease, dead_leases, exclusive, lease, live_leases, turn
from ckptvcs.store.local import LocalBackend
from tests.helpers.memory_backend import MemoryBackend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    for name in ("leases", "marks", "tmp", "cache"):
        (folder / name).mkdir(parents=True)
    return folder


@contextmanager
def holder(root: Path, boot: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a lease, of a machine that was started as `boot` where that is said."""
    code = f"""
import sys, ckptvcs.store.leases as leases
from pathlib import Path
from ckptvcs.store.local import LocalBackend
if {boot!r}: leases.boot_id = lambda: {boot!r}
with leases.lease(LocalBackend(Path({str(root)!r}))):
    print("there", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def found(root: Path) -> list[Holder]:
    backend = LocalBackend(root)
    return [leases.judge_lease(backend, name) for name in backend.names("leases")]


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def copied(root: Path, name: str, folder: Path | None = None) -> Path:
    return Path(shutil.copytree(root, (folder or root.parent) / name, copy_function=shutil.copy2))


# -- on one machine --------------------------------------------------------------------------------


def test_a_process_holds_its_lease_until_it_ends(root: Path) -> None:
    with holder(root) as process:
        assert found(root) == [Holder.LIVE]
        os.kill(process.pid, signal.SIGSTOP)
        assert found(root) == [Holder.LIVE]
        kill(process)
        assert found(root) == [Holder.GONE]
        assert live_leases(LocalBackend(root)) == []


def test_a_copy_is_held_by_nobody(root: Path) -> None:
    with lease(LocalBackend(root)), holder(root):
        copy = copied(root, "copy")
        assert found(copy) == [Holder.GONE] * 2
        assert found(root) == [Holder.LIVE] * 2
        with exclusive(LocalBackend(copy)):
            assert list(LocalBackend(copy).names("leases")) == []


def test_a_copy_on_another_disk_is_held_by_nobody(root: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == root.stat().st_dev:
        pytest.skip("there is one file system only")
    assert lease_files.is_own_device(memory.stat().st_dev)
    with holder(root):
        copy = copied(root, f"ckpt-test-{os.getpid()}", memory)
        try:
            assert found(copy) == [Holder.GONE] * lease_files.is_own_device(root.stat().st_dev)
        finally:
            shutil.rmtree(copy)


def test_a_copy_without_locks_is_known_by_its_number(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lease_files, "is_own_device", lambda _: True)
    with lease(LocalBackend(root)):
        copy = copied(root, "copy")
        assert found(copy) == [Holder.GONE]
        assert found(root) == [Holder.LIVE]


@pytest.mark.parametrize("locks", [True, False])
def test_a_process_of_another_container(
    root: Path, *, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "process_space", lambda: "pid:[another]")
    with holder(root) as process:
        if not locks:
            monkeypatch.setattr(
                local, "trace", lambda file: lease_files.make_trace(file, is_locked=None)
            )
        assert found(root) == [Holder.LIVE if locks else Holder.UNKNOWN]
        kill(process)
        assert found(root) == [Holder.GONE if locks else Holder.UNKNOWN]


def test_a_forked_child_withdraws_nothing(root: Path) -> None:
    backend = LocalBackend(root)
    with lease(backend) as name:
        hold = backend.hold("leases/other", lambda _: b"{}")
        child = os.fork()
        if child == 0:
            hold.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert sorted(backend.names("leases")) == sorted([name, "leases/other"])
        assert Holder.LIVE in found(root)
        hold.release()
    assert list(backend.names("leases")) == []


def test_a_lease_that_cannot_be_deleted_counts_no_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(disk, "unlink", refuse)
        with lease(LocalBackend(root)):
            pass
    assert found(root) == [Holder.GONE]
    with exclusive(LocalBackend(root)):
        pass


# -- two machines, and one that is started anew ----------------------------------------------------


def test_another_machine_of_the_same_name(root: Path) -> None:
    with holder(root, boot="that of another machine"):
        assert found(root) == [Holder.LIVE]
        with pytest.raises(BusyError, match="1 writer"), exclusive(LocalBackend(root)):
            pass


def test_this_machine_before_it_was_started_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not host.machine_id():
        pytest.skip("nothing tells this machine from its copies")
    with holder(root, boot="an earlier start") as process:
        kill(process)
    monkeypatch.setattr(lease_files, "is_own_device", lambda _: True)
    assert found(root) == [Holder.GONE]
    # Where others can write, too, it may be that of a machine that has the same name.
    monkeypatch.setattr(lease_files, "is_own_device", lambda _: False)
    assert found(root) == [Holder.UNKNOWN]
    monkeypatch.setattr(holders, "seconds_since_start", lambda: 100.0)
    (file,) = (root / "leases").iterdir()
    age(file, 99)
    assert found(root) == [Holder.UNKNOWN]
    age(file, 120)
    assert found(root) == [Holder.GONE]
    monkeypatch.setattr(holders, "seconds_since_start", lambda: 30.0)  # it may yet renew it
    assert found(root) == [Holder.UNKNOWN]
    monkeypatch.setattr(holders, "seconds_since_start", lambda: 100.0)
    monkeypatch.setattr(holders, "machine_id", lambda: "another")
    assert found(root) == [Holder.UNKNOWN]


def age(file: Path, seconds: float) -> None:
    """Set the time of a file back."""
    now = LocalBackend(file.parent.parent).clock_ns()
    os.utime(file, ns=(now, now - int(seconds * 1e9)))


def test_machines_that_cannot_be_told_apart_have_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, cards = tmp_path / "machine-id", tmp_path / "net"
    monkeypatch.setattr(host, "ID_FILES", (tmp_path / "none", installed))
    monkeypatch.setattr(host, "NETWORK", cards)
    name = host.machine_id.__wrapped__
    installed.write_text("0" * 32 + "\n")
    assert name() == ""  # a container sees no network card
    made = cards / "veth0"
    made.mkdir(parents=True)
    (made / "address").write_text("02:42:ac:11:00:02")
    assert name() == ""  # all containers may have this one
    real = cards / "eth0"
    (real / "device").mkdir(parents=True)
    (real / "address").write_text("52:54:00:00:00:01")
    one = name()
    (real / "address").write_text("52:54:00:00:00:02")
    assert len({"", one, name()}) == 3
    installed.write_text("uninitialized\n")
    assert name() == ""


# -- silence ---------------------------------------------------------------------------------------


class Clock:
    """The clock of this machine since its start, in the hands of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._patch = 1000.0, monkeypatch
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.forget()

    def forget(self) -> None:
        """Another process looks from now on."""
        self._patch.setattr(leases, "silence", holders.Silence())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def elsewhere(root: Path, **fields: object) -> Path:
    """The lease of a process on another machine."""
    said = {
        "host": "far",
        "boot": "b",
        "space": "s",
        "pid": 7,
        "started": "1",
        "machine": "m",
        "device": 1,
        "inode": 1,
        "fixed": False,
        "locked": True,
        "renewed": True,
    }
    path = root / "leases" / "far"
    path.write_text(json.dumps(said | fields))
    return path


def test_a_lease_that_nobody_renews_counts_no_more_after_an_hour(root: Path, clock: Clock) -> None:
    path = elsewhere(root)
    seen = []
    for _ in range(4):
        seen += found(root)
        clock.now += 1800
    assert seen == [Holder.UNKNOWN] * 2 + [Holder.SILENT] * 2
    os.utime(path)
    assert found(root) == [Holder.UNKNOWN]
    clock.now += 10 * 3600  # the file system may have been away all the time
    assert found(root) == [Holder.UNKNOWN]


def test_looks_of_several_processes_add_up(root: Path, clock: Clock) -> None:
    elsewhere(root)
    backend = LocalBackend(root)
    for _ in range(2):
        with pytest.raises(BusyError, match="1 writer") as caught, exclusive(backend):
            pass
        assert "process 7 on 'far'; if that is gone for good, delete leases/far" in str(
            caught.value.hint
        )
        clock.now += 2000
        clock.forget()
    with exclusive(backend):
        assert list(backend.names("leases")) == []


@pytest.mark.parametrize("wrong", ["boot", "rotten", "later", "longer"])
def test_notes_that_cannot_be_are_not_believed(
    wrong: str, root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(root)
    for _ in range(2):
        found(root)
        clock.now += 1800
    leases.silence.keep(LocalBackend(root))
    notes = root / "cache" / "silent"
    said = json.loads(notes.read_text())
    (row,) = said["seen"].values()
    if wrong == "boot":
        monkeypatch.setattr(holders, "boot_id", lambda: "another start")
    elif wrong == "rotten":
        notes.write_text("[" * 5000)
    elif wrong == "later":
        row[1] += 1e6
        notes.write_text(json.dumps(said))
    else:
        row[2] = 1e9
        notes.write_text(json.dumps(said))
    clock.forget()
    assert found(root) == [Holder.UNKNOWN]


@pytest.mark.parametrize(
    "fields", [{"renewed": False}, {"machine": None, "renewed": None}], ids=["no thread", "older"]
)
def test_who_renews_nothing_is_never_silent(
    fields: dict[str, Any], root: Path, clock: Clock
) -> None:
    path = elsewhere(root)
    said = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    for _ in range(5):
        assert found(root) == [Holder.LIVE]
        clock.now += 3600


def test_a_lease_is_renewed_while_it_is_held(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "BEAT", 0.01)
    monkeypatch.setattr(leases, "renewals", leases.Renewals())
    backend = LocalBackend(root)
    with lease(backend) as name:
        first = backend.look(name, 4096)[1].renewed_ns
        for _ in count():
            if backend.look(name, 4096)[1].renewed_ns != first:
                break
        assert json.loads(backend.read(name))["renewed"] is True


def test_where_no_thread_can_be_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parallel, "start_new_thread", refuse)
    monkeypatch.setattr(leases, "renewals", leases.Renewals())
    backend = LocalBackend(root)
    with lease(backend) as name:
        assert json.loads(backend.read(name))["renewed"] is False


# -- older programs --------------------------------------------------------------------------------


def _here(**fields: object) -> dict[str, object]:
    pid = os.getppid()
    return {
        "host": host.host_name(),
        "boot": host.boot_id(),
        "space": host.process_space(),
        "pid": pid,
        "started": host.started(pid),
    } | fields


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, Holder.LIVE),
        ({"started": "1"}, Holder.GONE),
        ({"pid": 2**22 + 1}, Holder.GONE),
        ({"pid": os.getpid()}, Holder.GONE),
        ({"host": "far", "boot": "b"}, Holder.LIVE),
        ({"boot": "an earlier start"}, Holder.GONE),
        ({"space": "another"}, Holder.LIVE),
        ({"host": "far"}, Holder.LIVE),
        ({"pid": "x"}, Holder.GONE),
        ({"pid": None}, Holder.GONE),
    ],
)
def test_leases_of_older_programs(
    fields: dict[str, object], wanted: Holder, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_files, "is_own_device", lambda _: True)
    (root / "leases" / "old").write_text(json.dumps(_here(**fields)))
    assert found(root) == [wanted]


# -- what follows ----------------------------------------------------------------------------------


def test_a_writer_that_was_silent_finds_its_lease_gone(
    root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(root)
    with lease(backend) as name:
        monkeypatch.setattr(leases, "judge", lambda *_, **__: Holder.UNKNOWN)
        for _ in range(3):
            live_leases(backend)
            clock.now += 1800
        assert dead_leases(backend) == [name]
        with exclusive(backend):
            pass
        with pytest.raises(ConflictError, match="lease"):
            check_lease(backend, name)


@pytest.mark.parametrize("make", [MemoryBackend, None])
def test_one_at_a_time_has_a_turn(
    make: Callable[[], MemoryBackend] | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(root) if make is None else make()
    monkeypatch.setattr(leases, "MIN_TURN", 0.1)
    busy = pytest.raises(BusyError, match="being changed")
    with turn(backend), leases.patience(0.0), busy, turn(backend):
        pass
    with turn(backend):
        pass
    assert list(backend.names("marks")) == []


def test_a_turn_is_waited_for_as_long_as_there_is_patience(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, ends = LocalBackend(root), threading.Event()
    monkeypatch.setattr(leases, "MIN_TURN", 0.0)
    monkeypatch.setattr(leases, "WARN_AFTER", 0.0)
    calm = time.sleep

    def sleep(seconds: float) -> None:
        if caplog.messages:  # it has said that it waits
            ends.set()
        calm(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    begun = threading.Event()

    def other() -> None:
        with turn(LocalBackend(root)):
            begun.set()
            assert ends.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    with leases.patience(math.inf), turn(backend):
        thread.join()
    assert caplog.messages == ["the repository is being changed: waiting"]
