"""No more threads, no more memory: work is done without them, or a command ends with one line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from _thread import start_new_thread
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import Repo, StorageError, parallel
from ckptvcs.codec.sections import inflate
from ckptvcs.errors import after
from ckptvcs.ops.checkout import hash_file
from ckptvcs.store import pack
from ckptvcs.store.ids import Kind, ObjectId
from tests.helpers.command_line import environment
from tests.helpers.crashing import save, states
from tests.helpers.faults import apart
from tests.helpers.refusing.asking import library

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
MiB = 1 << 20
NO_THREAD_LOCALS = "cannot allocate memory for thread-local data: ABORT"
"""What the C library prints when it ends a process for want of memory; nobody can catch it."""
LIMITS = range(140, 400, 4 if NIGHTLY else 120)  # MiB; below, OpenBLAS ends the process by itself


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no thread from now on."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(parallel, "start_new_thread", refused)
    parallel.shared_pool.cache_clear()


@pytest.mark.usefixtures("no_threads")
def test_without_threads_all_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    with Repo.init(tmp_path / "repo") as repo:
        save(tmp_path, range(1, 4))
        repo.commit(states(1)[0], step=1)
        assert repo.commit_async(states(2)[1], step=2).result().step == 2
        made = repo.commit_path(tmp_path / "step-3.pt", message="")
        assert repo.checkout_files(made.id, tmp_path / "out.pt").exact
        assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "step-3.pt").read_bytes()
        assert repo.verify().damage == []
        repo.gc()
        assert [entry.step for entry in repo.log()] == [3, 2, 1]


@pytest.mark.slow
def test_commands_without_threads(cut_folder: Path) -> None:
    root = cut_folder / "repo"
    Repo.init(root)
    for step in (1, 2):
        torch.save({"model": {"w": torch.randn(300, 1500)}, "step": step}, root / f"step-{step}.pt")
    env = environment() | {"LD_PRELOAD": str(library(cut_folder)), "REFUSING_THREADS": "1"}
    env.pop("OMP_NUM_THREADS", None)  # numpy would start threads
    for args in (
        "commit step-1.pt --raw",
        "watch . --once --settle 0",
        "verify",
        "log",
        "diff 1 2",
        "gc",
        "checkout 2 -o out.pt",
        "verify --subset 100%",
        "import . --delete-originals",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ckptvcs", *args.split()],
            cwd=root,
            text=True,
            env=env,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, (args, done.stderr)
        assert "thread" not in done.stderr
    assert Repo.open(root).verify().damage == []


def test_a_forked_child_hashes_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MiB))
    mine = hash_file(path)  # starts the threads of BLAKE3, which a child has none of
    assert apart(partial(hash_file, path)) == mine


def test_the_next_work_has_a_thread_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calm, refusals = start_new_thread, [False, True]  # the last one first

    def refused_once(*args: Any) -> int:
        if refusals.pop():
            raise RuntimeError("can't start new thread")
        return calm(*args)

    monkeypatch.setattr(parallel, "start_new_thread", refused_once)
    pool = parallel.Pool(1)
    assert pool.start(threading.get_ident).result() == threading.get_ident()
    assert pool.start(threading.get_ident).result() != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        pool.start(lambda: 1 // 0).result()
    assert pool.start(threading.get_ident).result() != threading.get_ident()  # it is still there
    assert not refusals
    pool.shutdown()
    apart(pool.shutdown)  # waits for nobody


def test_a_thread_that_dies_in_its_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def dies(*_: object) -> None:
        tried.append(1)
        raise MemoryError

    monkeypatch.setattr(parallel, "refused_until", 0.0)
    before = sys.unraisablehook
    pool = parallel.Pool(1)
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "START_TIMEOUT", 0.2)
        patch.setattr(parallel, "run_thread", dies)
        for _ in range(5):  # only the first one is waited for
            assert pool.start(threading.get_ident).result() == threading.get_ident()
    assert len(tried) == 1
    assert sys.unraisablehook is before
    monkeypatch.setattr(parallel, "refused_until", 0.0)
    assert pool.start(threading.get_ident).result() != threading.get_ident()
    pool.shutdown()


def test_work_goes_to_all_threads_and_each_once() -> None:
    pool, both = parallel.Pool(2), threading.Barrier(2)
    futures = [pool.start(both.wait) for _ in range(2)]  # which end together only
    assert sorted(future.result(20) for future in futures) == [0, 1]
    numbers: list[int] = []
    for future in [pool.start(partial(numbers.append, n)) for n in range(1000)]:
        future.result()
    assert sorted(numbers) == list(range(1000))
    pool.shutdown()


def test_work_that_was_cancelled_is_not_done() -> None:
    done: list[int] = []
    gate = threading.Event()
    pool = parallel.Pool(1)
    first = pool.start(gate.wait)
    later = [pool.start(partial(done.append, n)) for n in range(3)]
    assert later[0].cancel()
    threading.Timer(0.1, gate.set).start()
    pool.shutdown(cancel=True)
    assert first.done()
    assert all(future.cancelled() for future in later)
    assert not done


@pytest.mark.parametrize(
    "args",
    [
        "commit ../step-2.pt",
        pytest.param("verify", marks=pytest.mark.slow),
        pytest.param("checkout 1 -o ../out.pt", marks=pytest.mark.slow),
    ],
)
def test_limited_memory(args: str, cut_folder: Path) -> None:
    template = cut_folder / "template"
    (template / "repo").mkdir(parents=True)
    repo = Repo.init(template / "repo")
    for step in (1, 2):
        state = {"model": {"w": torch.randn(3000, 1500)}, "step": step}
        torch.save(state, template / f"step-{step}.pt")
    repo.commit_path(template / "step-1.pt", message="")
    codes = set()
    for limit in LIMITS:
        root = cut_folder / str(limit)
        shutil.copytree(template, root)
        done = subprocess.run(
            [sys.executable, "-m", "ckptvcs", *args.split()],
            cwd=root / "repo",
            text=True,
            env=environment() | {"OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            check=False,
            timeout=300,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (limit * MiB,) * 2),
        )
        if NO_THREAD_LOCALS in done.stderr:
            assert done.returncode == 127
        else:
            assert done.returncode in (0, StorageError.exit_code), (limit, done.stderr)
        if done.returncode == StorageError.exit_code:
            lines = [line.partition(":")[0] for line in done.stderr.splitlines()]
            assert lines.count("error") == 1, done.stderr
            assert "Traceback" not in done.stderr
        codes.add(done.returncode)
        repo = Repo.open(root / "repo")
        is_made = args.startswith("commit") and not done.returncode
        assert [entry.step for entry in repo.log()] == ([2, 1] if is_made else [1])
        assert repo.verify().damage == []
        shutil.rmtree(root)
    assert codes == {0, StorageError.exit_code}


def test_what_cannot_be_decompressed_for_want_of_memory_is_not_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import zstandard

    def refused(*_: object, **__: object) -> None:
        raise zstandard.ZstdError("decompression error: Allocation error : not enough memory")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", refused)
    with pytest.raises(MemoryError):
        inflate(memoryview(b"1234"), 10)
    entry = pack.Entry(ObjectId("0" * 64), Kind.COMMIT, pack.ZSTD, None, 0, 0, 3, 3)
    payload = zstandard.ZstdCompressor().compress(b"abc")
    with pytest.raises(MemoryError):
        pack.decode_object(entry, payload, lambda _: b"")


def test_what_was_done_is_said_first() -> None:
    for error in (OSError(5, "it fails"), MemoryError(), StorageError("it fails", hint="x")):
        with (
            pytest.raises(StorageError, match=r"^it is made, but: ") as caught,
            after("it is made"),
        ):
            raise error
        assert "it is made, but: it is made" not in str(caught.value)
    with (
        pytest.raises(StorageError, match=r"^it is made, but: it") as caught,
        after("it is made"),
        after(lambda: "it is made"),
    ):
        raise StorageError("it fails")
    assert str(caught.value) == caught.value.message == "it is made, but: it fails"
    with pytest.raises(KeyboardInterrupt) as interrupted, after("it is made"):
        raise KeyboardInterrupt
    assert interrupted.value.__notes__ == ["it is made"]
    with pytest.raises(MemoryError), after(""):
        raise MemoryError
