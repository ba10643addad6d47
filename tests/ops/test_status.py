"""Status: what differs from HEAD on disk, and what no commit contains, without reading files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs import Repo
from ckptvcs.hashing import hasher
from tests.helpers.training import train


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    """Two committed checkpoints of three in a folder; HEAD is at step 2."""
    repo, folder = Repo.init(tmp_path), tmp_path / "run"
    folder.mkdir()
    for state in train(3):
        torch.save(state, folder / f"step-{state['step']}.pt")
    for step in (1, 2):
        repo.commit_path(folder / f"step-{step}.pt", message="")
    return repo


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file that is hashed."""
    counts: list[int] = []

    def spy(**options: Any) -> Any:
        counts.append(1)
        return hasher(**options)

    monkeypatch.setattr("ckptvcs.ops.status.hasher", spy)
    return counts


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def test_committed_files_are_not_read(run: Repo, hashed: list[int]) -> None:
    found = run.status()
    assert found.step == 2
    assert not found.changes
    assert names(found.uncommitted) == ["step-3.pt"]
    # Its size is that of a committed file; it is hashed once.
    assert len(hashed) == 1
    assert run.status() == found
    assert len(hashed) == 1
    assert run.status(verify=True) == found
    assert len(hashed) == 4


def test_changes_are_found(run: Repo) -> None:
    path = run.root / "run" / "step-2.pt"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    # The time of the inode tells that it changed after the commit.
    assert run.status().changes == (("changed", path),)
    assert run.status().changes == (("changed", path),)
    path.write_bytes(data[:-1])
    assert run.status().changes == (("changed", path),)
    path.unlink()
    assert run.status().changes == (("missing", path),)


def test_the_near_form_of_a_checkout_is_told_from_the_original(run: Repo) -> None:
    for state in train(5)[3:]:
        torch.save(state, run.root / "run" / "step-4.pt")
        run.commit_path(run.root / "run" / "step-4.pt", message="", step=state["step"])
    path = run.checkout_files(1, force=True).paths[0]
    run.move_head(1)
    assert run.status().changes == (("near", path),)
    assert run.status(verify=True).changes == (("near", path),)


def test_copies_and_other_files_are_not_listed(run: Repo) -> None:
    folder = run.root / "run"
    shutil.copyfile(folder / "step-1.pt", folder / "best.pt")
    (folder / "notes.txt").write_text("x")
    (folder / ".step-9.pt").write_text("x")
    (folder / "tmp-8.pt").write_text("x")
    (folder / "link.pt").symlink_to("step-3.pt")
    (folder / "folder.pt").mkdir()
    (folder / "step-4.safetensors").write_text("x")
    assert names(run.status().uncommitted) == ["step-3.pt", "step-4.safetensors"]


def test_directories_are_listed_beside_directories(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    for step in (1, 2):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.save({"weight": torch.randn(300)}, folder / "model.pt")
    (tmp_path / "out" / "logs").mkdir()
    repo.commit_path(tmp_path / "out" / "checkpoint-1", message="")
    assert names(repo.status().uncommitted) == ["checkpoint-2"]
    repo.commit_path(tmp_path / "out" / "checkpoint-2", message="")
    assert not repo.status().uncommitted


def test_a_wrong_cache_costs_only_time(run: Repo) -> None:
    expected = run.status()
    for text in ("", "[]", "{", '{"a": 1}', '{"a": []}', "[" * 100_000, "\ufffd"):
        (run.folder / "cache" / "hashes.json").write_text(text, "utf-8")
        assert run.status() == expected
    (run.folder / "cache" / "hashes.json").unlink()
    (run.folder / "cache" / "hashes.json").mkdir()
    assert run.status() == expected


def test_states_have_no_files_beside_them(repo: Repo) -> None:
    repo.commit({"weight": torch.randn(300)})
    (repo.root / "model.pt").write_text("x")
    assert not repo.status().uncommitted
