"""docs/format.md is complete: a reader made from it alone reads what the program writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptvcs.gc.retention import Policy
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.checkpoints import every_dtype, trainer_directory, views
from tests.helpers.training import save_run, train
from tests.spec_reader import SpecRepository, archive


@pytest.mark.parametrize(
    "codec",
    [
        "lossless",
        "near",
        "near:step=4,zone=0.66,gamma=0.5,rank=4",
        "near:step=0.01",
        "excp",
        "excp-max",
        "excp:bits=2,alpha=1e-4",
    ],
)
def test_a_reader_of_the_specification_decodes_chains(
    codec: str, repo: Repo, tmp_path: Path
) -> None:
    paths = save_run(tmp_path, train(5))
    results = [repo.commit_path(path, message="x", codec=codec) for path in paths]
    spec = SpecRepository(repo.folder)
    line = spec.line(spec.branch("main"))
    assert line == [result.id for result in reversed(results)]
    for path, result in zip(paths, results, strict=True):
        target = tmp_path / "out.pt"
        repo.checkout_files(result.id, target, force=True)
        data = spec.file(result.id, result.commit.files[0].path)
        assert data == target.read_bytes()
        if codec == "lossless":
            assert data == path.read_bytes()


def test_what_gc_leaves(tmp_path: Path) -> None:
    repo, paths = Repo.init(tmp_path / "near"), save_run(tmp_path, train(8))
    names = [repo.commit_path(path, message="x").id for path in paths]
    tables = [handle(repo).catalog.commit(name).parts["model"].values for name in names[:6]]
    for _ in range(2):  # the second one merges what the first one left
        repo.gc(Policy(last=2), now=True)
    repo = Repo.open(tmp_path / "near")
    assert not any(map(handle(repo).catalog.store.contains, tables))
    assert [entry.step for entry, _ in repo.trajectory()] == [7, 8]
    spec = SpecRepository(repo.folder)
    for name, path in zip(names[6:], paths[6:], strict=True):
        assert spec.file(name, path.name) == path.read_bytes()
    assert not repo.verify().damage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype, repo: Repo, tmp_path: Path) -> None:
    for step in range(4):
        torch.manual_seed(1)
        weight = torch.randn(3000) + torch.randn(3000) * 0.02 * step
        path = tmp_path / f"{step}.pt"
        torch.save({"model": {"weight": weight.to(dtype)}, "step": step}, path)
        result = repo.commit_path(path, message="x", codec="excp-max")
        data = SpecRepository(repo.folder).file(result.id, result.commit.files[0].path)
        repo.checkout_files(result.id, tmp_path / "out.pt", force=True)
        assert (tmp_path / "out.pt").read_bytes() == data
    assert not result.commit.exact


def test_types_views_and_directories(repo: Repo, tmp_path: Path) -> None:
    torch.save(every_dtype(), tmp_path / "types.pt")
    torch.save(views(), tmp_path / "views.pt", _use_new_zipfile_serialization=False)
    folder = trainer_directory(tmp_path, train(1)[0], 10)
    for path in (tmp_path / "types.pt", tmp_path / "views.pt", folder):
        result = repo.commit_path(path, message="x")
        spec = SpecRepository(repo.folder)
        for file in result.commit.files:
            origin = path / file.path if path.is_dir() else path
            assert spec.file(result.id, file.path) == origin.read_bytes()


def test_tensors_of_several_slices(repo: Repo, tmp_path: Path) -> None:
    for step in range(3):
        torch.manual_seed(0)
        weight = torch.randn((1 << 20) + 5000) + torch.randn((1 << 20) + 5000) * 1e-3 * step
        moments = {"step": torch.tensor(1.0), "exp_avg": weight * 1e-3, "exp_avg_sq": weight**2}
        state = {
            "model": {"w": weight},
            "step": step,
            "optimizer": {"state": {0: moments}, "param_groups": [{"params": [0]}]},
        }
        torch.save(state, tmp_path / f"{step}.pt")
        result = repo.commit_path(tmp_path / f"{step}.pt", message="x", codec="excp")
        data = SpecRepository(repo.folder).file(result.id, result.commit.files[0].path)
        repo.checkout_files(result.id, tmp_path / "out.pt", force=True)
        assert (tmp_path / "out.pt").read_bytes() == data


@pytest.mark.parametrize("form", [None, "near"])
@pytest.mark.parametrize("codec", ["lossless", "near", "excp"])
def test_a_reader_of_the_specification_reads_bundle_files(
    codec: str, form: str | None, repo: Repo, tmp_path: Path
) -> None:
    for path in save_run(tmp_path, train(5)):
        repo.commit_path(path, message="x", codec=codec)
    repo.note("HEAD", message="a note")
    done = repo.bundle(["HEAD~3", "HEAD~1.."], tmp_path / "some.ckptz", form=form)
    manifest, spec = archive(done.path)
    assert [row["id"] for row in manifest["commits"]] == [entry.id for entry in done.entries]
    line = spec.line(manifest["refs"]["heads/main"])
    assert len(line) == 5
    assert spec.noted(line[0])["message"] == "a note"
    clone = Repo.clone(done.path, tmp_path / "clone")
    for entry in done.entries:
        clone.checkout_files(entry.id, tmp_path / "out.pt", force=True)
        file = spec.file(entry.id, entry.commit.files[0].path)
        assert file == (tmp_path / "out.pt").read_bytes()
    assert SpecRepository(clone.folder).line(line[0]) == line
