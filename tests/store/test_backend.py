"""The contract of backends, kept by a directory, by memory and through instrumentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs.errors import StorageError
from ckptvcs.store import disk
from ckptvcs.store.backend import Backend, write_once
from ckptvcs.store.local import LocalBackend
from tests.helpers.faults import Steps
from tests.helpers.instrumented_backend import InstrumentedBackend
from tests.helpers.memory_backend import MemoryBackend
from tests.store.contract import BackendContract


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return LocalBackend(tmp_path)

    def test_content_is_durable_before_its_name_and_its_name_before_the_end(
        self, tmp_path: Path
    ) -> None:
        backend = LocalBackend(tmp_path)
        with Steps(tmp_path).taken() as steps:
            write_once(backend, "packs/x", b"content")
        order = [step.operation for step in steps.seen]
        link = order.index("link")
        assert order.index("write") < order.index("sync") < link
        assert "sync_folder" in order[link:]

    def test_a_replacement_survives_a_gc_that_deletes_its_temporary_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = LocalBackend(tmp_path)
        backend.replace("format", b"old")
        real = disk.rename
        lost: list[Path] = []

        def rename(old: Path, new: Path) -> None:
            if not lost:
                lost.append(old)
                old.unlink()
            real(old, new)

        monkeypatch.setattr(disk, "rename", rename)
        backend.replace("format", b"new")
        assert lost
        assert backend.read("format") == b"new"


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return MemoryBackend()


class TestInstrumentedBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return InstrumentedBackend(LocalBackend(tmp_path))

    @pytest.mark.parametrize("method", ["write", "publish"])
    def test_a_write_that_fails_leaves_nothing(self, tmp_path: Path, method: str) -> None:
        backend = InstrumentedBackend(LocalBackend(tmp_path))
        backend.fails = method
        with pytest.raises(StorageError):
            write_once(backend, "packs/x", b"content")
        assert list(backend.names("packs")) == []
        assert list(backend.names("tmp")) == []
