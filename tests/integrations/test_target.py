"""What all integrations share: a commit waits while gc sweeps."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ckptvcs import Repo
from ckptvcs.errors import BusyError
from ckptvcs.integrations import target
from ckptvcs.ops.history_reader import handle
from ckptvcs.store import leases
from ckptvcs.store.leases import exclusive


def test_a_commit_waits_for_gc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.dat").write_bytes(b"data" * 100)
    where = target.Target(tmp_path / "repo", None)
    assert where.existing() is None
    sweeping = exclusive(handle(where.repo).catalog.store.backend)
    rests = list[float]()
    sleep = time.sleep

    def rest(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():  # it renews the lease
            sleep(seconds)
            return
        rests.append(seconds)
        if len(rests) == 3:
            sweeping.__exit__(None, None, None)

    monkeypatch.setattr("time.sleep", rest)
    monkeypatch.setattr(leases, "WARN_AFTER", -1.0)
    sweeping.__enter__()
    assert where.commit(tmp_path / "a.dat", step=3, metrics={}).commit.step == 3
    assert len(rests) == 3
    assert [record.message for record in caplog.records] == [
        "gc is sweeping this repository: waiting"
    ]
    assert [entry.message for entry in Repo.open(tmp_path / "repo").log()] == ["a.dat"]
    with (
        exclusive(handle(where.repo).catalog.store.backend),
        leases.patience(0),
        pytest.raises(BusyError),
    ):
        where.commit(tmp_path / "a.dat", step=4, metrics={})


def test_what_is_not_understood_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"\x80no pickle" * 1000)
    target.Target(tmp_path, None).commit(tmp_path / "run", step=1, metrics={})
    (record,) = caplog.records
    assert record.name == "ckptvcs"
    assert record.message.startswith("run: optimizer.pt: not readable as tensors (")
