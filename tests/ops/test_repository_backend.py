"""A repository on a backend other than a directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Repo
from ckptvcs.gc.retention import Policy
from ckptvcs.ops.repository import Repository
from tests.helpers.memory_backend import MemoryBackend


def test_every_operation_uses_the_chosen_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends: dict[Path, MemoryBackend] = {}

    def backend_at(folder: Path) -> MemoryBackend:
        return backends.setdefault(folder.absolute(), MemoryBackend())

    monkeypatch.setattr(Repository, "backend_at", staticmethod(backend_at))
    repo = Repo.init(tmp_path)
    for step in range(4):
        repo.commit({"w": np.full(100, step, np.float32)}, step=step)
    repo.configure("keep-exact", "1")
    repo.gc(Policy(last=2), now=True)
    repo = Repo.open(tmp_path)
    assert not repo.verify().damage
    assert not repo.repair().files
    assert [entry.step for entry in repo.log()] == [3, 2]
    files = backends[tmp_path / ".ckpt"].files
    assert {name.partition("/")[0] for name in files} >= {"format", "meta", "refs"}
    on_disk = {path.relative_to(repo.folder).parts[0] for path in repo.folder.rglob("*.*")}
    assert on_disk <= {"cache", "config.toml"}


def test_a_handle_takes_a_backend(tmp_path: Path) -> None:
    backend = MemoryBackend()
    made = Repository.init(tmp_path, backend=backend)
    assert Repository(made.folder, backend).head() == made.head()
    assert not (made.folder / "format").exists()
