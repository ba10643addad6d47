from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs.store.backend import Backend, MemoryBackend
from ckptvcs.store.local import LocalBackend
from tests.store.contract import BackendContract


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return MemoryBackend()


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return LocalBackend(tmp_path)
