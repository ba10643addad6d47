"""Import a folder: which files are taken, and where their commits go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.checkpoint.survey import survey
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError, StorageError
from ckptvcs.ops import import_folder
from ckptvcs.ops.checkout import hash_file
from ckptvcs.ops.commit import commit_path
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer, ImportItem
from ckptvcs.ops.repository import Repository
from ckptvcs.repo import Repo
from tests.helpers.checkpoints import trainer_directory
from tests.helpers.importing import (
    State,
    actions,
    branches,
    messages,
    names,
    remove,
    run,
    save,
    silent,
)

# -- what is in a folder ---------------------------------------------------------------------------


def found(folder: Path, pattern: str | None = None) -> list[tuple[str, int | None]]:
    return [(one.name, one.step) for one in survey(folder, pattern, folder / ".ckpt")[0]]


def test_natural_order(folder: Path, states: list[State]) -> None:
    assert found(folder) == [
        ("step-800.pt", 800),
        ("step-900.pt", 900),
        ("step-1000.pt", 1000),
        ("step-1100.pt", 1100),
    ]
    assert found(folder, "*1?00.pt") == [("step-1000.pt", 1000), ("step-1100.pt", 1100)]


@pytest.mark.parametrize(
    ("name", "inside", "step"),
    [
        ("epoch=3-step=1000-v1.ckpt", 7, 1000),
        ("checkpoint-500.pt", None, 500),
        ("global_step0020.bin", None, 20),
        ("model_iter_30.pth", 7, 30),
        ("epoch_3.pt", 7, 7),
        ("net-0500-ema.pt", None, 500),
        ("loss-0.25.pt", None, None),
        ("best.pt", 9, 9),
        ("best.pt", None, None),
        ("model-bf16.pt", None, None),
        ("model-100-bf16.pt", None, 100),
        ("gpt-v2.pt", None, None),
    ],
)
def test_steps_are_read_from_names_or_contents(
    tmp_path: Path, name: str, inside: int | None, step: int | None
) -> None:
    state: State = {"w": torch.ones(3)}
    torch.save(state if inside is None else state | {"step": inside}, tmp_path / name)
    assert found(tmp_path) == [(name, step)]


def test_copies_come_behind_what_is_named_by_its_step(tmp_path: Path) -> None:
    for name in ("best.pt", "step3.pt", "a.pt", "other-10.pt", "other-9.pt"):
        torch.save({"w": torch.ones(3)} | ({"step": 3} if name != "a.pt" else {}), tmp_path / name)
    assert [name for name, _ in found(tmp_path)] == [
        "step3.pt",
        "best.pt",
        "other-9.pt",
        "other-10.pt",
        "a.pt",
    ]


def test_a_copy_has_the_step_that_the_name_of_another_gives(tmp_path: Path) -> None:
    for name, inside in (("checkpoint-1.pt", 999), ("checkpoint-2.pt", 1999), ("best.pt", 999)):
        torch.save({"w": torch.ones(3), "step": inside}, tmp_path / name)
    assert found(tmp_path) == [("checkpoint-1.pt", 1), ("best.pt", 1), ("checkpoint-2.pt", 2)]


def test_what_is_left_out(folder: Path, tmp_path: Path, states: list[State]) -> None:
    taken = [name for name, _ in found(folder)]
    (folder / "notes.txt").write_text("x")
    (folder / "last.pt").symlink_to("step-900.pt")
    (folder / "elsewhere").symlink_to(tmp_path)
    shutil.copy(folder / "step-900.pt", folder / "training_args.bin")
    shutil.copy(folder / "step-900.pt", folder / "model-00001-of-00002.safetensors")
    os.mkfifo(folder / "pipe.pt")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("x")
    save(folder / "other", states[:2])
    Repo.init(folder / "repository")
    torch.save({"w": torch.ones(3)}, folder / "repository" / "model.pt")
    for hidden in (".step-1.pt", "step-2.pt.tmp", "tmp-checkpoint-7", "step-3.pt~"):
        shutil.copy(folder / "step-900.pt", folder / hidden)
    kept, left = survey(folder, None, tmp_path / "nowhere")
    assert [one.name for one in kept] == taken
    assert {one.name: one.reason for one in left} == {
        "notes.txt": "not a .pt, .pth, .bin, .ckpt, .safetensors file",
        "last.pt": "a symbolic link",
        "elsewhere": "a symbolic link",
        "training_args.bin": "a piece of a checkpoint, not one by itself",
        "model-00001-of-00002.safetensors": "a piece of a checkpoint, not one by itself",
        "pipe.pt": "neither a file nor a directory",
        "logs": "a folder without model files",
        "other": "a folder of checkpoints; import it separately",
        "repository": "a folder with a repository in it",
    }


def test_folders_that_are_refused(near: Repo, folder: Path, states: list[State]) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        Importer(handle(near), folder / "nothing")
    with pytest.raises(InvalidInputError, match="is a file"):
        Importer(handle(near), folder / "step-800.pt")
    with pytest.raises(InvalidInputError, match="itself"):
        Importer(handle(near), near.folder / "packs")
    with pytest.raises(InvalidInputError, match="codec"):
        Importer(handle(near), folder, codec="zip")
    with pytest.raises(NotFoundError, match="no checkpoints"):
        Importer(handle(near), folder, pattern="*.bin")
    checkpoint = trainer_directory(folder, states[0], 500)
    with pytest.raises(InvalidInputError, match="is a checkpoint itself"):
        Importer(handle(near), checkpoint)
    assert near.log() == []


# -- where it goes ---------------------------------------------------------------------------------


def test_all_are_committed_in_order(repo: Repo, folder: Path) -> None:
    importer = run(repo, folder)
    assert set(actions(importer).values()) == {"committed"}
    assert messages(repo) == ["step-800.pt", "step-900.pt", "step-1000.pt", "step-1100.pt"]
    assert [entry.step for entry in repo.log()] == [1100, 1000, 900, 800]
    assert branches(repo) == ["main"]
    for entry in repo.log():
        out = folder / "out"
        repo.checkout_files(entry.id, out, force=True)
        assert hash_file(out) == hash_file(folder / entry.message)
    assert len(names(folder)) == 5  # nothing is removed unasked


def test_trainer_directories(repo: Repo, tmp_path: Path, states: list[State]) -> None:
    for number in (100, 50):
        trainer_directory(tmp_path / "run", states[number // 50], number)
    importer = run(repo, tmp_path / "run")
    assert messages(repo) == ["checkpoint-50", "checkpoint-100"]
    assert [item.found.kind for item in importer.items] == ["directory"] * 2
    assert actions(run(repo, tmp_path / "run")) == {
        "checkpoint-50": "known",
        "checkpoint-100": "known",
    }
    assert len(repo.log()) == 2


def test_the_same_content_twice_is_one_commit(near: Repo, folder: Path) -> None:
    shutil.copy(folder / "step-900.pt", folder / "best.pt")
    importer = run(near, folder)
    assert len(near.log(all_branches=True)) == 4
    by_name = {item.found.name: item for item in importer.items}
    assert by_name["best.pt"].same_as == "step-900.pt"
    assert by_name["best.pt"].id == by_name["step-900.pt"].id
    assert by_name["step-900.pt"].same_as is None


def test_other_content_of_a_step_goes_to_one_side_branch(
    repo: Repo, folder: Path, states: list[State]
) -> None:
    ema = [state | {"model": {k: v * 2 for k, v in state["model"].items()}} for state in states]
    save(folder, ema[:4], "step-{}-ema.pt")
    torch.save({"w": torch.ones(300)}, folder / "best.pt")
    torch.save({"w": torch.zeros(300)}, folder / "last.pt")
    run(repo, folder)
    line = ["step-800.pt", "step-900.pt", "step-1000.pt", "step-1100.pt"]
    assert messages(repo) == line
    side = [f"step-{step}-ema.pt" for step in (800, 900, 1000, 1100)]
    assert messages(repo, "main-2") == side
    assert messages(repo, "main-3")[-2:] == ["best.pt", "last.pt"]
    assert branches(repo) == ["main", "main-2", "main-3"]
    head = repo.head()
    assert head is not None
    assert head.branch == "main"


def test_another_run_goes_to_a_branch_of_its_own(
    repo: Repo, folder: Path, states: list[State]
) -> None:
    repo.commit(states[5], step=1000)
    run(repo, folder)  # 1100 would fit main, and belongs to the others all the same
    assert [entry.step for entry in repo.log()] == [1000]
    assert len(messages(repo, "main-2")) == 4
    torch.save(states[4], folder / "step-1200.pt")
    assert actions(run(repo, folder))["step-1200.pt"] == "committed"
    assert messages(repo, "main-2")[-1] == "step-1200.pt"
    assert [entry.step for entry in repo.log()] == [1000]


def test_a_branch_that_is_asked_for(repo: Repo, folder: Path) -> None:
    run(repo, folder, branch="old", pattern="step-?00.pt")
    assert repo.log() == []
    run(repo, folder, branch="old")
    assert len(messages(repo, "old")) == 4
    assert branches(repo) == ["old"]


def test_names_without_steps_follow_each_other(repo: Repo, folder: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{'abcd'[number]}.pt")
    run(repo, folder)
    assert messages(repo) == ["a.pt", "b.pt", "c.pt", "d.pt"]


# -- what goes wrong -------------------------------------------------------------------------------


def test_an_interrupted_import_goes_on(
    repo: Repo, folder: Path, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = [state | {"model": {k: v * 2 for k, v in state["model"].items()}} for state in states]
    save(folder, ema[:4], "step-{}-ema.pt")
    commit, left = commit_path, [3]

    def dies(*args: Any, **options: Any) -> Any:
        if not left[0]:
            raise StorageError("the disk is full")
        left[0] -= 1
        return commit(*args, **options)

    monkeypatch.setattr(import_folder, "commit_path", dies)
    with pytest.raises(StorageError):
        run(repo, folder)
    assert len(repo.log(all_branches=True)) == 3
    monkeypatch.undo()
    done = list(actions(run(Repo.open(repo.root), folder)).values())
    assert (done.count("known"), done.count("committed")) == (3, 5)
    assert len(messages(repo)) == len(messages(repo, "main-2")) == 4
    assert branches(repo) == ["main", "main-2"]
    assert set(actions(run(repo, folder)).values()) == {"known"}
    assert len(repo.log(all_branches=True)) == 8


def test_files_that_are_cut_off_are_skipped(repo: Repo, folder: Path, states: list[State]) -> None:
    whole = (folder / "step-900.pt").read_bytes()
    (folder / "step-900.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "step-1.pt").touch()
    (folder / "junk.bin").write_bytes(os.urandom(1000))
    made = trainer_directory(folder, states[0], 500)
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copy(weights, folder / "step-2.safetensors")
    optimizer = trainer_directory(folder, states[0], 501) / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    importer = run(repo, folder)
    failed = {name for name, action in actions(importer).items() if action == "failed"}
    assert failed == {
        "step-900.pt",
        "step-1.pt",
        "junk.bin",
        "checkpoint-500",
        "checkpoint-501",
        "step-2.safetensors",
    }
    assert messages(repo) == ["step-800.pt", "step-1000.pt", "step-1100.pt"]
    before = set(names(folder))
    remove(importer)
    assert set(names(folder)) == failed
    assert before > failed


def test_a_commit_that_is_not_proven_keeps_its_original(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Restorer.write_file

    def fails(self: Restorer, *args: Any) -> str:
        if self.commit.step == 900:
            raise CorruptionError("a tensor does not decode to its recorded hash")
        return write(self, *args)

    monkeypatch.setattr(Restorer, "write_file", fails)
    importer = run(repo, folder)
    assert actions(importer)["step-900.pt"] == "failed"
    remove(importer)
    assert names(folder) == ["step-900.pt"]
    remove(importer, accept_near=True)
    assert names(folder) == ["step-900.pt"]


@pytest.mark.parametrize("step", [800, 1000])
def test_a_proof_reads_the_frames_of_its_commit(
    near: Repo, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the weights that the cache has since they were coded."""
    near.configure("keep-exact", "0")
    commit = commit_path

    def damaged(repository: Repository, *args: Any, **options: Any) -> Any:
        before = set(repository.folder.rglob("*.pack"))
        made = commit(repository, *args, **options)
        if made.commit.step == step:
            for pack in set((repository.folder / "packs").rglob("*.pack")) - before:
                data = bytearray(pack.read_bytes())
                data[len(data) // 3] ^= 1
                pack.chmod(0o644)
                pack.write_bytes(data)
        return made

    monkeypatch.setattr(import_folder, "commit_path", damaged)
    importer = run(near, folder)
    assert actions(importer)[f"step-{step}.pt"] == "failed"
    remove(importer, accept_near=True)
    assert f"step-{step}.pt" in names(folder)


def test_damage_between_proof_and_removal_keeps_the_original(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importer = run(repo, folder)
    monkeypatch.setattr(Restorer, "write_file", lambda *_: "0" * 64)
    kept = remove(importer)
    assert all("is not restored" in (reason or "") for reason in kept.values())
    assert len(names(folder)) == 4


def test_an_error_above_its_bound_is_none_to_live_with(near: Repo, folder: Path) -> None:
    run(near, folder)
    near.configure("max-weight-error", "1e-9")
    importer = run(near, folder)
    assert actions(importer) == {
        "step-800.pt": "failed",
        "step-900.pt": "failed",
        "step-1000.pt": "known",
        "step-1100.pt": "known",
    }
    remove(importer, accept_near=True)
    assert names(folder) == ["step-800.pt", "step-900.pt"]


def test_a_bound_that_was_given_with_the_codec_counts(repo: Repo, folder: Path) -> None:
    repo.configure("keep-exact", "0")
    importer = run(repo, folder, codec="near:max_weight_error=0.9")
    assert set(actions(importer).values()) == {"committed"}
    assert set(actions(run(repo, folder, codec="near:max_weight_error=1e-8")).values()) == {
        "failed"
    }
    assert set(actions(run(repo, folder, codec="near:max_weight_error=0")).values()) == {"known"}


@pytest.fixture
def seen() -> list[ImportItem]:
    return []


def test_progress_counts_every_byte_once(
    repo: Repo, folder: Path, states: list[State], seen: list[ImportItem]
) -> None:
    trainer_directory(folder, states[0], 500)
    (folder / "step-7.pt").write_bytes(b"PK\x03\x04")
    for _ in range(2):
        counts: list[int] = []
        importer = Importer(handle(repo), folder)
        importer.look(silent)
        watch: Callable[[ImportItem], None] = seen.append
        importer.run(counts.append, watch)
        assert sum(counts) == sum(item.found.size_bytes for item in importer.items)
        assert min(counts) >= 0
    assert len(seen) == 12


def test_progress_moves_while_a_checkpoint_is_read(
    repo: Repo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptvcs.encode.encoder.Encoder.run", interrupted)  # after that pass
    counts: list[int] = []
    importer = Importer(handle(repo), folder)
    importer.look(silent)
    with pytest.raises(KeyboardInterrupt):
        importer.run(counts.append, silent)
    assert sum(counts) > importer.items[0].found.size_bytes // 4
