"""An import with --delete-originals needs room for one commit, whatever the folder holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from ckptvcs.errors import StorageError
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.repo import Repo
from tests.helpers.command_line import Ckpt
from tests.helpers.disks import MiB, fill, limited, mounted, used_bytes
from tests.helpers.importing import names, silent
from tests.helpers.profiles import short
from tests.helpers.soaking import run_states

WAYS = {"exact": ["--codec", "lossless"], "near": ["--accept-near"]}


def save(folder: Path, count: int, shape: tuple[int, int]) -> int:
    """Write checkpoints of a run; return the bytes of one."""
    folder.mkdir()
    for state in islice(run_states(0, shape), count):
        torch.save(state, folder / f"step-{state['step']}.pt")
    return (folder / "step-1.pt").stat().st_size


@pytest.fixture
def disks() -> Iterator[list[Path]]:
    """File systems to unmount."""
    made: list[Path] = []
    yield made
    for target in made:
        subprocess.run(["umount", "-l", target], check=True)


@pytest.mark.parametrize(
    ("count", "shape", "free"),
    [(12, (400, 300), 4 * MiB), pytest.param(30, (1700, 1510), 80 * MiB, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("way", short(WAYS, ["near"]))
def test_import_into_little_room(
    way: str,
    count: int,
    shape: tuple[int, int],
    free: int,
    tmp_path: Path,
    disks: list[Path],
    ckpt_process: Ckpt,
) -> None:
    size = save(tmp_path / "made", count, shape)
    disk = mounted("tmpfs", count * size + free + MiB // 2, tmp_path)
    disks.append(disk)
    shutil.move(tmp_path / "made", disk / "run")
    hidden = disk / "tmp"  # what is temporary has no other disk
    hidden.mkdir()
    fill(disk, free)
    options = ["import", "run", "--delete-originals", "--yes", "--json", *WAYS[way]]
    ckpt_process("init", cwd=disk, TMPDIR=str(hidden))
    done = ckpt_process(*options, cwd=disk, TMPDIR=str(hidden)).json
    assert names(disk / "run") == []
    assert [item["action"] for item in done["checkpoints"]] == ["committed"] * count
    assert done["freed_bytes"] == done["raw_bytes"]
    log = ckpt_process("log", "--json", cwd=disk).json
    assert [entry["exact"] for entry in log].count(True) == (count if way == "exact" else 2)
    assert ckpt_process("verify", "--json", cwd=disk).json["ok"]
    if way == "near":
        assert used_bytes(disk / ".ckpt") < count * size / 2


def imported(repo: Repo, folder: Path, way: str) -> Importer:
    codec = "lossless" if way == "exact" else None
    importer = Importer(handle(repo), folder, codec=codec)
    importer.look(silent)
    importer.run_and_remove(accept_near=way == "near", progress=silent, watch=silent)
    return importer


@pytest.mark.parametrize("way", WAYS)
def test_the_disk_gets_no_fuller_than_by_the_first_commit(way: str, tmp_path: Path) -> None:
    size = save(tmp_path / "run", 6, (200, 150))
    repo = Repo.init(tmp_path)
    start = used_bytes(tmp_path)
    with limited(tmp_path, start + 6 * size) as seen:
        importer = imported(repo, tmp_path / "run", way)
    assert names(tmp_path / "run") == []
    assert {item.removal.keep_reason for item in importer.items} == {None}
    assert max(seen) - start < 1.6 * size  # a commit, and the weights that the next one needs
    assert repo.verify().damage == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tenths", [1, 5, 12])
def test_import_with_any_room(tenths: int, way: str, tmp_path: Path) -> None:
    size = save(tmp_path / "run", 4, (200, 150))
    repo = Repo.init(tmp_path)
    limit = used_bytes(tmp_path) - MiB + size * tenths // 10  # the reserve is given up
    problem = None
    with limited(tmp_path, limit):
        try:
            imported(repo, tmp_path / "run", way)
        except StorageError as error:
            problem = error
    assert (problem is not None) == (way == "exact" and tenths < 10)
    assert repo.verify().damage == []
    if problem is not None:
        assert "disk is full" in (problem.hint or "")
        assert len(names(tmp_path / "run")) == 4
        imported(Repo.open(tmp_path), tmp_path / "run", way)
    assert names(tmp_path / "run") == []
    assert [entry.step for entry in repo.log()] == [4, 3, 2, 1]
    assert all(entry.exact for entry in repo.log()[: 4 if way == "exact" else 2])


def test_no_patch_is_written_that_the_import_deletes(tmp_path: Path) -> None:
    save(tmp_path / "run", 5, (40, 30))
    repo = Repo.init(tmp_path)
    imported(repo, tmp_path / "run", "near")
    patches = [entry.commit.patch_bytes > 0 for entry in repo.log()]
    assert patches == [True, True, False, False, False]


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_command_starts_on_a_full_disk(switch: str, tmp_path: Path, disks: list[Path]) -> None:
    disk = mounted("tmpfs", 24 * MiB, tmp_path)
    disks.append(disk)
    package = Path(__file__).parents[2] / "ckptvcs"
    shutil.copytree(package, disk / "ckptvcs", ignore=shutil.ignore_patterns("__pycache__"))
    fill(disk)
    here = {name: str(disk) for name in ("HOME", "TMPDIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env = os.environ | here | {"PYTHONPATH": str(disk), "CKPT_COMPILED": switch}

    def run(*args: str) -> str:
        return subprocess.run(
            [sys.executable, *args], env=env, check=True, cwd=disk, capture_output=True, text=True
        ).stdout

    assert "import" in run("-m", "ckptvcs", "--help")
    assert "--delete-originals" in run("-m", "ckptvcs", "import", "--help")
    code = "from ckptvcs.codec import kernels as k; k.prepare(1); print(k.__file__)"
    assert str(disk) in run("-c", code)
