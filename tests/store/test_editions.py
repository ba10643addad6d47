"""The index of many processes: none waits for another, none takes away what another reads, and what
is killed, suspended or forked leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lmdb
import pytest

from ckptvcs.store.ids import Kind, ObjectId, PackId
from ckptvcs.store.index import drafting, index
from ckptvcs.store.index import editions as edition_files
from ckptvcs.store.index.editions import Family
from ckptvcs.store.index.recent import Recent
from ckptvcs.store.index.rows import Row
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import PackInfo

PATIENCE = 60  # seconds, after which a process is one that waits for ever
SMALL = 4000  # bytes of a journal, so that editions are made often


def keys_of(kind: Kind, content: bytes) -> list[bytes]:
    return [b"starts:" + content[:3]] if kind == Kind.COMMIT else []


def opened(folder: Path) -> ObjectStore:
    return ObjectStore(LocalBackend(folder), folder / "cache" / "index", keys_of)


def put(store: ObjectStore, *contents: bytes) -> list[ObjectId]:
    with store.packing("meta") as pack:
        return [pack.add(Kind.COMMIT, content) for content in contents]


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


def index_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


def editions(folder: Path) -> list[int]:
    return Family.of(folder / "cache" / "index").scan()[0]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "JOURNAL_BYTES", SMALL)


def forked(act: Callable[[], object]) -> int:
    """A child that does something and ends; one that takes too long is killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(PATIENCE)
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stopped(pid: int) -> bool:
    """Whether a child has suspended itself; else it has ended."""
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found is not None
    return found.si_code == os.CLD_STOPPED


@pytest.fixture
def patience() -> Iterator[None]:
    """Fail instead of waiting without an end."""

    def fail(*_: object) -> None:
        raise TimeoutError("this waits without an end")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def agrees_with_packs(folder: Path, scratch: Path) -> bool:
    """Whether a new process would know what the packs hold, without a look at them."""
    alone = ObjectStore(LocalBackend(folder), scratch / "index", keys_of)
    try:
        return opened(folder).index.agrees(alone.index)
    finally:
        alone.index.close()
        shutil.rmtree(scratch)


# -- forks -----------------------------------------------------------------------------------------


def test_forked_children_read_and_write_by_what_they_inherit(tmp_path: Path, often: None) -> None:
    store = opened(tmp_path)
    (name,) = put(store, b"abc")
    before = files(tmp_path)

    def read() -> None:
        assert store.get(name, Kind.COMMIT) == b"abc"
        assert store.find(b"starts:abc") == [name]

    assert [ended(forked(read)) for _ in range(3)] == [0, 0, 0]
    assert files(tmp_path) == before
    assert ended(forked(lambda: put(store, *(b"new%d" % n for n in range(40))))) == 0
    assert len(store.find(b"starts:new")) == 40  # the parent is told, and goes on
    put(store, b"new of the parent")
    assert len(editions(tmp_path)) >= 2
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


def test_a_child_leaves_the_editions_of_its_parent_alone(tmp_path: Path, often: None) -> None:
    store = opened(tmp_path)
    put(store, b"abc")

    def write() -> None:
        for number in range(60):
            put(store, b"%03d" % number + bytes(200))

    for _ in range(2):
        assert ended(forked(write)) == 0
        assert not store.index.editions.follower.own
        # Those of other tests in this process may be deleted.
        maps = Path("/proc/self/maps").read_text().splitlines()
        mine = [line for line in maps if str(tmp_path) in line]
        assert mine
        assert not any("(deleted)" in line for line in mine)
    assert len(store.ids(Kind.COMMIT)) == 61


@pytest.mark.parametrize("work", ["rebuild", "refresh", "write", "read"])
def test_no_lock_of_another_thread_is_left_in_a_child(
    work: str, tmp_path: Path, often: None
) -> None:
    store = opened(tmp_path)
    names = put(store, *(b"%03d" % n for n in range(50)))
    done, turns = threading.Event(), list[int]()
    works: dict[str, Callable[[], object]] = {
        "rebuild": store.rebuild,
        "refresh": store.refresh,
        "write": lambda: put(store, b"w%d" % len(turns)),
        "read": lambda: [store.get(name, Kind.COMMIT) for name in names],
    }

    def busy() -> None:
        while not done.is_set():
            works[work]()
            turns.append(0)

    def act() -> None:
        assert store.get(names[0], Kind.COMMIT) == b"000"
        store.refresh()
        put(store, b"of a child")

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        assert [ended(pid) for pid in [forked(act) for _ in range(20)]] == [0] * 20
    finally:
        done.set()
        thread.join()
    assert turns
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


# -- killed ----------------------------------------------------------------------------------------


def read_and_die(store: ObjectStore) -> None:
    env = store.index.editions.follower.read().base.env
    assert env is not None
    kept = env.begin()
    store.ids(Kind.COMMIT)
    os.kill(os.getpid(), signal.SIGKILL)
    del kept


def test_killed_readers_do_not_make_it_grow(tmp_path: Path, often: None) -> None:
    sizes = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        store = opened(folder)
        for number in range(200):
            put(store, b"%03d" % number + bytes(100))
            if killed and number % 20 == 0:
                assert ended(forked(lambda s=store: read_and_die(s))) == -signal.SIGKILL  # type: ignore[misc]
                assert ended(forked(lambda f=folder: read_and_die(opened(f)))) == -signal.SIGKILL  # type: ignore[misc]
        sizes.append(index_bytes(folder))
    assert sizes[1] <= 1.5 * sizes[0]


def test_its_size_and_the_cost_of_a_write_stay_flat(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, copied, rows = opened(tmp_path), list[object](), list[int]()
    copy, add = shutil.copyfile, drafting.apply_rows

    def count(draft: Any, txn: Any, found: Any, keys: Any) -> None:
        rows[-1] += len(found)
        add(draft, txn, found, keys)

    def copy_file(*names: Any) -> None:
        copied.append(names)
        copy(*names)

    monkeypatch.setattr(shutil, "copyfile", copy_file)
    monkeypatch.setattr("ckptvcs.store.index.index.apply_rows", count)
    sizes, copies = [], []
    for _ in range(5):
        rows.append(0)
        for number in range(100):
            old = store.list_packs() if number else {}
            put(store, b"%03d" % number + bytes(100))
            store.delete_packs(old)
        sizes.append(index_bytes(tmp_path))
        copies.append(len(copied))
    assert max(sizes[1:]) <= 1.2 * min(sizes[1:])
    assert max(rows[1:]) <= 1.2 * min(rows[1:])
    assert copies[1:] == copies[1:2] * 4  # of whole editions: only before there are two
    assert len(files(tmp_path)) <= 7
    assert len(store.ids(Kind.COMMIT)) == 1


def test_who_is_behind_reads_the_newest_edition_and_not_the_journals_before_it(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, behind = opened(tmp_path), opened(tmp_path)
    (first,) = put(store, b"abc")
    assert behind.get(first, Kind.COMMIT) == b"abc"
    before, number = editions(tmp_path), 0
    while editions(tmp_path) == before:
        put(store, b"x%02d" % number)
        number += 1
    taken, take = list[Row](), Recent.apply

    def count(recent: Recent, rows: Iterable[Row]) -> None:
        rows = list(rows)
        taken.extend(rows)
        take(recent, rows)

    monkeypatch.setattr(Recent, "apply", count)
    assert len(behind.find(b"starts:x00")) == 1
    assert len(taken) < number  # each put is several rows


def test_few_rows_are_written_to_an_edition_at_once(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, written, apply = opened(tmp_path), list[int](), drafting.apply_rows

    def count(draft: Any, txn: Any, rows: Any, keys: Any) -> None:
        written.append(len(rows))
        apply(draft, txn, rows, keys)

    monkeypatch.setattr(index, "ROWS_PER_WRITE", 20)
    monkeypatch.setattr(index, "apply_rows", count)
    names = put(store, *(b"%03d" % number for number in range(100)))  # one record of the journal
    for number in range(30):
        put(store, b"x%02d" % number)
    assert sum(written) > 100
    assert max(written) <= 20
    assert all(store.contains(name) for name in names)
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


def test_to_open_it_no_pack_is_read(tmp_path: Path, often: None) -> None:
    store = opened(tmp_path)
    names = put(store, *(b"%03d" % n for n in range(100)))
    for number in range(30):
        put(store, b"x%02d" % number)

    class Counting(LocalBackend):
        reads = 0

        def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            Counting.reads += 1
            return super().read(name, offset, length)

        def names(self, folder: str) -> Iterator[str]:
            Counting.reads += 1
            return super().names(folder)

    again = ObjectStore(Counting(tmp_path), tmp_path / "cache" / "index", keys_of)
    assert [again.get(name, Kind.COMMIT) for name in names] == [b"%03d" % n for n in range(100)]
    assert Counting.reads == 0


# -- suspended -------------------------------------------------------------------------------------

STEPS = [
    (os, "write"),
    (os, "ftruncate"),
    (os, "unlink"),
    (os, "open"),
    (os, "rename"),
    (fcntl, "flock"),
    (lmdb, "open"),
    (Path, "rename"),
    (Path, "unlink"),
    (edition_files.Draft, "write"),
    (edition_files.Draft, "publish"),
]


def suspended_at(step: int, act: Callable[[], object]) -> None:
    """Do something, and suspend this process before one of its steps."""
    left = [step]

    def wrapped(calm: Callable[..., Any]) -> Callable[..., Any]:
        def stop_or_go(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            return calm(*args, **kwargs)

        return stop_or_go

    for owner, name in STEPS:
        setattr(owner, name, wrapped(getattr(owner, name)))
    act()


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    "work",
    [
        "add",
        "remove",
        pytest.param("begin", marks=pytest.mark.slow),
        pytest.param("make an edition", marks=pytest.mark.slow),
        pytest.param("rebuild", marks=pytest.mark.slow),
    ],
)
def test_nobody_waits_for_a_writer_that_is_suspended_at_any_step(work: str, tmp_path: Path) -> None:
    template = tmp_path / "template"
    names = put(opened(template), *(b"%03d" % n for n in range(20)))
    packs = opened(template).list_packs()

    def act(folder: Path) -> None:
        store = opened(folder)
        match work:
            case "add":
                put(store, b"new")
            case "make an edition":
                store.index.editions.make_edition()
                store.index.editions.make_edition()
                store.index.editions.make_edition()
            case "remove":
                put(store, b"000")
                store.delete_packs(packs)
            case "rebuild":
                store.rebuild()
            case "begin":
                shutil.rmtree(folder / "cache")
                opened(folder)

    step, steps = 0, 0
    while True:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(template, folder)
        reader = opened(folder)
        pid = forked(lambda f=folder, s=step: suspended_at(s, lambda: act(f)))  # type: ignore[misc]
        if not stopped(pid):
            assert ended(pid) == 0
            break
        steps += 1
        kept = [b"000"] if work == "remove" else [b"%03d" % n for n in range(20)]
        assert reader.get(names[0], Kind.COMMIT) == b"000"
        (mine,) = put(reader, b"meanwhile")
        fresh = opened(folder)
        assert fresh.get(mine, Kind.COMMIT) == b"meanwhile"
        with contextlib.suppress(BlockingIOError):
            fresh.index.editions.make_edition()
        fresh.refresh()
        assert fresh.rebuild() >= 2
        os.kill(pid, signal.SIGKILL if step % 2 else signal.SIGCONT)
        ended(pid)
        for store in (opened(folder), reader, fresh):
            store.refresh()
            assert store.find(b"starts:mea") == [mine]
            assert {store.get(name, Kind.COMMIT) for name in names[: len(kept)]} == set(kept)
        assert agrees_with_packs(folder, tmp_path / "alone")
        for store in (reader, fresh):
            store.index.close()
        shutil.rmtree(folder)
    assert steps > 5


# -- many at once ----------------------------------------------------------------------------------


def test_many_processes_at_once_lose_nothing_and_agree(tmp_path: Path, often: None) -> None:
    store = opened(tmp_path)

    def write(number: int) -> None:
        mine = opened(tmp_path)
        for count in range(60):
            content = b"%d-%d" % (number, count) + bytes(100)
            (name,) = put(mine, content)
            assert name in mine.find(b"starts:" + content[:3])
            if count % 5 == 4:
                (pack,) = {place.pack for place in mine.places(name)}
                mine.delete_packs({pack: "meta"})

    children = [forked(lambda n=n: write(n)) for n in range(4)]  # type: ignore[misc]
    seen = [len(store.ids(Kind.COMMIT)) for _ in range(200)]
    assert [ended(pid) for pid in children] == [0] * 4
    assert max(seen) <= 4 * 60
    assert len(store.ids(Kind.COMMIT)) == 4 * 48  # without a look at the packs
    assert len(opened(tmp_path).ids(Kind.COMMIT)) == 4 * 48
    assert store.index.agrees(opened(tmp_path).index)
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


def test_all_who_begin_it_at_once_come_to_agree(tmp_path: Path) -> None:
    put(opened(tmp_path), *(b"%03d" % n for n in range(300)))
    shutil.rmtree(tmp_path / "cache")

    def write(number: int) -> None:
        put(opened(tmp_path), b"new%d" % number)

    assert [ended(pid) for pid in [forked(lambda n=n: write(n)) for n in range(6)]] == [0] * 6  # type: ignore[misc]
    assert len(opened(tmp_path).find(b"starts:new")) == 6
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


READER = """
import sys
from pathlib import Path
from ckptvcs.store.local import LocalBackend
from ckptvcs.store.ids import Kind
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import PackInfo
folder = Path(sys.argv[1])
store = ObjectStore(LocalBackend(folder), folder / "cache" / "index", lambda kind, content: [])
for line in sys.stdin:
    print(len(store.ids(Kind.COMMIT)), flush=True)
"""


def test_nobody_deletes_what_another_process_has_open(tmp_path: Path, often: None) -> None:
    store = opened(tmp_path)
    put(store, b"abc")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None

    def count() -> int:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
        return int(reader.stdout.readline())

    with reader:
        assert count() == 1
        for turn in range(1, 4):
            for number in range(100):
                put(store, b"%d%02d" % (turn, number) + bytes(100))
            store.rebuild()
            process = Path(f"/proc/{reader.pid}")
            held = [os.readlink(file) for file in (process / "fd").iterdir()]  # noqa: PTH115
            held += (process / "maps").read_text().splitlines()
            there = [line for line in held if str(tmp_path / "cache") in line]
            assert len(there) >= 3
            assert not [line for line in there if "(deleted)" in line]
            assert count() == 1 + 100 * turn
        reader.stdin.close()
    put(store, b"last")
    store.rebuild()
    assert len(editions(tmp_path)) == 1


def test_files_of_other_starts_go_once_nobody_has_them_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(edition_files, "boot_id", lambda: "another start, or machine")
        other = opened(tmp_path)
        (name,) = put(other, b"abc")
    theirs = files(tmp_path)
    store = opened(tmp_path)
    assert {file for file in theirs if not file.name.endswith("-lock")} <= set(files(tmp_path))
    assert other.get(name, Kind.COMMIT) == store.get(name, Kind.COMMIT) == b"abc"
    other.index.close()
    store.rebuild()
    assert not {*theirs} & {*files(tmp_path)}


# -- rot, and no room ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "folder", "link", "pipe"])
def test_a_journal_that_is_rotten_is_not_believed(damage: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    (old,) = put(store, b"abc")
    (new,) = put(store, b"new")
    family = Family.of(tmp_path / "cache" / "index")
    path = family.journal(family.scan()[1][-1])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    other = tmp_path / "other"
    other.write_bytes(b"of somebody else")
    path.unlink()
    match damage:
        case "flip":
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(other)
        case "pipe":
            os.mkfifo(path)
    for again in (opened(tmp_path), store):
        again.refresh()
        assert again.get(old, Kind.COMMIT) == b"abc"
        assert again.find(b"starts:new") == [new]
        put(again, b"more")
    assert other.read_bytes() == b"of somebody else"
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


@pytest.mark.parametrize("short", [True, False])
def test_what_found_no_room_in_the_journal_is_found_in_the_packs(
    short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = opened(tmp_path), opened(tmp_path)
    (old,) = put(store, b"abc")
    assert other.find(b"starts:abc") == [old]
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if short:
            return write(descriptor, data[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        (new,) = put(store, b"new")
        assert store.find(b"starts:new") == [new]
    assert other.find(b"starts:new") == [new]
    assert opened(tmp_path).find(b"starts:new") == [new]
    (last,) = put(store, b"new, last")
    assert set(other.find(b"starts:new")) == {new, last}
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


def test_where_no_file_can_be_locked_each_process_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    def only_here(descriptor: int, how: int) -> None:
        if str(tmp_path) in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115
            refuse()

    monkeypatch.setattr(fcntl, "flock", only_here)
    one, two = opened(tmp_path), opened(tmp_path)
    (name,) = put(one, b"abc")
    assert two.get(name, Kind.COMMIT) == b"abc"
    assert one.find(b"starts:abc") == two.find(b"starts:abc") == [name]


def test_a_cache_that_is_deleted_while_it_is_used(tmp_path: Path) -> None:
    store = opened(tmp_path)
    (old,) = put(store, b"abc")
    shutil.rmtree(tmp_path / "cache")
    (new,) = put(opened(tmp_path), b"new")
    assert store.get(new, Kind.COMMIT) == b"new"
    (last,) = put(store, b"last")
    assert opened(tmp_path).find(b"starts:las") == [last]
    assert store.get(old, Kind.COMMIT) == b"abc"
    assert agrees_with_packs(tmp_path, tmp_path / "alone")


@pytest.mark.parametrize("what", ["adds", "makes anew"])
def test_a_pack_that_is_deleted_while_another_process_finds_it(what: str, tmp_path: Path) -> None:
    store, other = opened(tmp_path), opened(tmp_path)
    (name,) = put(store, b"one")
    (pack,) = {place.pack for place in store.places(name)}
    if what == "adds":
        store.index.remove({pack})  # the file is there still
        read = other.index.read_pack

        def delete(found: PackId, folder: str) -> PackInfo:
            info = read(found, folder)
            store.delete_packs({found: folder})
            return info

        with mock.patch.object(other.index, "read_pack", delete):
            other.refresh()
    else:
        calm = store.backend.delete

        def rebuild(file: str) -> None:
            other.rebuild()
            assert other.index.known(name)
            calm(file)

        with mock.patch.object(store.backend, "delete", rebuild):
            store.delete_packs({pack: "meta"})
    for places in (store.index, other.index, opened(tmp_path).index):
        assert not places.known(name)
        assert not places.pack_sizes()
