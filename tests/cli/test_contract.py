"""The commands, their options, their JSON and their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptvcs.cli import log as cli_log
from tests.helpers.checkpoints import trainer_directory
from tests.helpers.command_line import COMMIT_KEYS, Ckpt, disk, sha
from tests.helpers.training import train, train_on


def test_commit_reports_the_commit_as_json(
    ckpt: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt("init")
    ckpt("config", "keep-exact", 0)
    store = tmp_path / ".ckpt"
    for number, codec in enumerate(["lossless", "lossless", "excp", "excp-max"]):
        before = disk(store / "packs") + disk(store / "meta")
        made = ckpt(
            "commit",
            run_files[number],
            "-m",
            "hello",
            "--codec",
            codec,
            "--metric",
            "a=1.5",
            "--metric",
            "b=nan",
            "--json",
        ).json
        assert made.keys() >= COMMIT_KEYS
        after = disk(store / "packs") + disk(store / "meta")
        assert made["stored_bytes"] + made["patch_bytes"] == after - before
        assert made["raw_bytes"] == run_files[number].stat().st_size
        assert made["step"] == number + 1
        assert made["metrics"] == {"a": 1.5, "b": "NaN"}
        assert made["exact"] == all(form == "exact" for form in made["fidelity"].values())
        assert made["exact"] == (codec == "lossless")
        assert made["error"].keys() >= {"weight_rel", "residual_nmse"}
        assert (made["error"]["weight_rel"] > 0) == (codec != "lossless")
        assert made["kind"] == ("keyframe" if number == 0 else "delta")
    assert made["fidelity"] == {"model": "near", "optimizer": "near", "rest": "exact"}


def test_log_shows_commits_newest_first(ckpt: Ckpt, history: Path) -> None:
    ckpt("tag", "v1", "3")
    entries = ckpt("log", "--json").json
    assert [e["step"] for e in entries] == [5, 4, 3, 2, 1]
    for entry in entries:
        assert entry.keys() >= COMMIT_KEYS | {"time", "metrics", "parents", "branch", "tags"}
    assert entries[2]["tags"] == ["v1"]
    assert entries[0]["parents"] == [entries[1]["id"]]
    assert [e["step"] for e in ckpt("log", "-n", 2, "--json").json] == [5, 4]
    lines = ckpt("log").out.splitlines()
    heading = "step id when message loss on disk later ratio fidelity"
    assert lines[0].split() == heading.split()
    assert len(lines) == 6
    assert entries[0]["id"][:8] in lines[1]


def test_a_long_log_is_cut(ckpt: Ckpt, history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_log, "DEFAULT_ENTRIES", 3)
    shown = ckpt("log")
    assert len(shown.out.splitlines()) == 1 + 3
    assert "3 newest commits; use -n N to show more" in shown.err
    assert len(ckpt("log", "--graph").out.splitlines()) == 1 + 3
    assert len(ckpt("log", "-n", 4).out.splitlines()) == 1 + 4
    assert len(ckpt("log", "--json").json) == 5


def test_checkout_writes_what_was_committed(
    ckpt: Ckpt, history: Path, run_files: list[Path]
) -> None:
    done = ckpt("checkout", 2, "--json").json
    assert done["exact"]
    assert sha(history / "model.pt") == sha(run_files[1])
    ckpt("checkout", "HEAD~1", "-o", "there/old.pt")
    assert sha(history / "there" / "old.pt") == sha(run_files[0])
    assert ckpt("status", "--json").json["step"] == 2
    ckpt("checkout", "main")
    assert sha(history / "model.pt") == sha(run_files[4])
    assert ckpt("status", "--json").json["branch"] == "main"


def test_checkout_loses_nothing(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    (history / "model.pt").write_bytes(b"precious")
    refused = ckpt("checkout", 2, code=4)
    assert "--force" in refused.err
    assert (history / "model.pt").read_bytes() == b"precious"
    ckpt("checkout", 2, "--force")
    assert sha(history / "model.pt") == sha(run_files[1])


def test_a_file_that_is_only_near_in_the_store_is_kept(ckpt: Ckpt, history: Path) -> None:
    ckpt("config", "keep-exact", 0)
    train_on(history / "model.pt")
    ckpt("commit", "model.pt", "--codec", "excp")
    ckpt("checkout", 1, code=4)
    ckpt("checkout", 1, "--force")
    ckpt("checkout", "main")  # writes the near form ...
    ckpt("checkout", 1)  # ... which may be overwritten: it can be had again
    ckpt("checkout", "main")
    shutil.rmtree(history / ".ckpt" / "cache" / "written")
    ckpt("checkout", "main")  # it is what this commit restores to


def test_checkout_says_whose_last_copy_a_file_is(
    ckpt: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt("init")
    for number, path in enumerate(run_files[:4], 1):
        shutil.copy(path, tmp_path / f"step_{number}.pt")
        ckpt("commit", f"step_{number}.pt")
    made = {row["step"]: row["id"][:8] for row in ckpt("log", "--json").json}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}

    def refused(step: int, state: str) -> None:
        done = ckpt("checkout", step, code=4)
        assert done.err.splitlines()[0] == (
            f"error: {tmp_path}/step_{step}.pt is the original of commit {made[step]}, {state}: "
            "it is the last exact copy"
        )
        assert "commit it again to keep it exactly" in done.err.splitlines()[1]

    refused(1, "which is only near now")
    refused(2, "which is only near now")
    ckpt("checkout", 3)  # still exact
    (tmp_path / "step_3.pt").write_bytes(before[tmp_path / "step_1.pt"])
    done = ckpt("checkout", 3, code=4)  # the original of another commit
    assert f"step_3.pt is the original of commit {made[1]}, which is only near now" in done.err
    (tmp_path / "step_3.pt").write_bytes(b"something else")
    assert (
        "step_3.pt has changes that no commit contains exactly" in ckpt("checkout", 3, code=4).err
    )
    ckpt("checkout", 3, "--force")
    ckpt("commit", "step_1.pt", "--branch", "again")
    ckpt("checkout", 1)  # the exact form is there again
    assert {path: path.read_bytes() for path in before} == before


def test_checkout_says_what_became_of_a_commit(
    ckpt: Ckpt, history: Path, run_files: list[Path]
) -> None:
    made = {row["step"]: row["id"][:8] for row in ckpt("log", "--json").json}
    ckpt("gc", "--keep-optimizer-last", 2, "--now")
    (history / "model.pt").write_bytes(run_files[2].read_bytes())
    said = ckpt("checkout", "main", code=4).err
    assert f"model.pt is the original of commit {made[3]}, whose optimizer part was dropped" in said
    ckpt("gc", "--keep-last", 1, "--now")
    said = ckpt("checkout", "main", code=4).err
    assert f"model.pt is the original of commit {made[3]}, which was dropped" in said
    assert "last exact copy" in said


def test_files_beside_near_weights_can_be_had_again(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    ckpt("config", "keep-exact", 0)
    folder, texts = tmp_path / "run", {}
    folder.mkdir()
    for step, state in enumerate(train(3), 1):
        torch.save(state, folder / "model.pt")
        texts[step] = f'{{"step": {step}}}'.ljust(5000)
        (folder / "config.json").write_text(texts[step])
        ckpt("commit", "run", "--step", step)
    said = ckpt("checkout", 2, code=4).err  # of the weights, not of the text
    assert "run/model.pt is an original of commit" in said
    (folder / "model.pt").unlink()
    ckpt("checkout", 2)
    assert (folder / "config.json").read_text() == texts[2]
    (folder / "config.json").write_text("mine")
    assert "config.json has changes" in ckpt("checkout", 1, code=4).err


def test_near_checkouts(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> None:
    ckpt("init")
    ckpt("config", "keep-exact", 0)
    for path in run_files:
        ckpt("commit", path, "--codec", "excp-max")
    ckpt("checkout", 4, "-o", "near.pt", "--require", "exact", code=4)
    assert not (tmp_path / "near.pt").exists()
    ckpt("checkout", 4, "-o", "near.pt")
    near = torch.load(tmp_path / "near.pt", weights_only=True)
    mapped = torch.load(tmp_path / "near.pt", weights_only=True, mmap=True)
    true = torch.load(run_files[3], weights_only=True)
    assert near["step"] == true["step"]
    assert torch.equal(near["rng"], true["rng"])
    frozen = "4.weight"
    assert torch.equal(near["model"][frozen], true["model"][frozen])
    for name, value in true["model"].items():
        assert torch.equal(near["model"][name], mapped["model"][name])
        if not value.is_floating_point() or "running" in name or value.numel() < 128:
            assert torch.equal(near["model"][name], value)
        else:
            assert (near["model"][name] - value).norm() < 0.6 * value.norm()
    for key, moments in true["optimizer"]["state"].items():
        assert torch.equal(near["optimizer"]["state"][key]["step"], moments["step"])
    assert near["optimizer"]["param_groups"] == true["optimizer"]["param_groups"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_checkout_writes_the_model_or_the_optimizer_alone(
    suffix: str, ckpt: Ckpt, history: Path, run_files: list[Path]
) -> None:
    true = torch.load(run_files[2], weights_only=True)
    ckpt("checkout", 3, "--only", "model", "-o", f"m.{suffix}")
    ckpt("checkout", 3, "--only", "optimizer", "-o", f"o.{suffix}")
    if suffix == "pt":
        model = torch.load(history / "m.pt", weights_only=True)
        optimizer = torch.load(history / "o.pt", weights_only=True)
        assert optimizer["param_groups"] == true["optimizer"]["param_groups"]
        assert torch.equal(
            optimizer["state"][0]["exp_avg"], true["optimizer"]["state"][0]["exp_avg"]
        )
    else:
        found = load_file(history / "m.safetensors")
        model = dict(found)
        moments = load_file(history / "o.safetensors")
        wanted = true["optimizer"]["state"][1]["exp_avg_sq"]
        assert torch.equal(moments["state.1.exp_avg_sq"], wanted)
    assert model.keys() == true["model"].keys()
    assert all(torch.equal(model[name], value) for name, value in true["model"].items())
    ckpt("checkout", 3, "--only", "model", "-o", f"m.{suffix}", code=4)


def test_checkout_restores_trainer_directories(ckpt: Ckpt, tmp_path: Path) -> None:
    states = train(3)
    ckpt("init", "--codec", "lossless")
    for state in states:
        folder = trainer_directory(tmp_path / "out", state, state["step"] * 100)
        ckpt("commit", folder)
    assert [e["step"] for e in ckpt("log", "--json").json] == [300, 200, 100]
    originals = {p.name: sha(p) for p in (tmp_path / "out" / "checkpoint-200").iterdir()}
    ckpt("checkout", 200, "-o", "elsewhere")
    assert {p.name: sha(p) for p in (tmp_path / "elsewhere").iterdir()} == originals
    shutil.rmtree(tmp_path / "out" / "checkpoint-200")
    ckpt("checkout", 200)
    back = tmp_path / "out" / "checkpoint-200"
    assert {p.name: sha(p) for p in back.iterdir()} == originals


def test_a_revision_names_its_commit(ckpt: Ckpt, history: Path) -> None:
    ids = {e["step"]: e["id"] for e in ckpt("log", "--json").json}
    ckpt("tag", "good", "2")
    ckpt("branch", "side", "3")
    for revision, step in {
        "2": 2,
        "step:2": 2,
        "HEAD": 5,
        "latest": 5,
        "HEAD~2": 3,
        "main": 5,
        "main@4": 4,
        "good": 2,
        "side": 3,
        "side~1": 2,
        "best:loss:min": 5,
        "best:loss:max": 1,
        ids[4]: 4,
        ids[4][:8]: 4,
        f"id:{ids[4][:10]}": 4,
    }.items():
        assert ckpt("show", revision, "--json").json["step"] == step, revision
    assert "nearest steps: 1, 2" in ckpt("show", 0, code=3).err
    assert "did you mean main" in ckpt("show", "mian", code=3).err
    ckpt("show", "best:nothing", code=3)
    ckpt("show", "HEAD~99", code=3)
    ckpt("show", "id:ffff", code=3)


def test_a_lower_step_starts_a_branch(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    (history / "model.pt").write_bytes(run_files[2].read_bytes())
    made = ckpt("commit", "model.pt", "--step", 4, "-m", "again")
    assert "main-2" in made.err
    assert ckpt("status", "--json").json["branch"] == "main-2"
    assert [e["step"] for e in ckpt("log", "--json").json] == [4, 3, 2, 1]
    assert len(ckpt("log", "--all", "--json").json) == 6
    assert ckpt("show", "main", "--json").json["step"] == 5
    again = ckpt("show", "4", "--json").json
    assert again["message"] == "again"  # the newest on HEAD's line


def test_committing_on_from_an_old_step_starts_a_branch(
    ckpt: Ckpt, history: Path, run_files: list[Path]
) -> None:
    ckpt("checkout", 2)
    assert ckpt("status", "--json").json["detached"]
    (history / "model.pt").write_bytes(run_files[3].read_bytes())
    assert "started branch 'main-2'" in ckpt("commit", "model.pt", "-m", "other").err
    assert [e["step"] for e in ckpt("log", "--json").json] == [4, 2, 1]


def test_unchanged_content_costs_no_tensor_bytes(ckpt: Ckpt, history: Path) -> None:
    made = ckpt("commit", "model.pt", "-m", "the same again", "--json").json
    assert made["stored_bytes"] < 2500
    assert made["branch"] == "main"
    assert not ckpt("verify", "--json").json["damage"]


def test_near_is_the_default_and_says_its_errors(
    ckpt: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt("init")
    ckpt("config", "keep-exact", 0)
    for path in run_files:
        made = ckpt("commit", path, "--json").json
    names = {"weight_rel", "residual_nmse", "fisher_nmse", "update_nmse", "max_abs", "lag"}
    assert made["codec"] == "near"
    assert made["error"].keys() == names
    assert 0 < made["error"]["residual_nmse"] < 1
    assert 0 < made["error"]["update_nmse"] < 1
    shown = ckpt("show", "HEAD", "--json").json
    near = {t["name"]: t["error"] for t in shown["tensors"] if t["error"]}
    assert all(error.keys() == names for error in near.values())
    assert all(error["residual_nmse"] <= 1 for error in near.values())
    assert any(error["update_nmse"] for error in near.values())
    assert any(t["error"] is None for t in shown["tensors"])
    assert "update_nmse" in ckpt("show").out
    assert "near 0.0" in ckpt("log").out
    assert not ckpt("verify", "--json").json["damage"]


def test_equal_tensors_are_stored_once(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    big = torch.randn(100_000)
    weights = {"a": big, "b": big.clone(), "c": torch.randn(1000)}
    sizes = []
    for step in range(2):
        weights["c"] = weights["c"] + 1
        torch.save({"model": weights, "step": step}, tmp_path / "m.pt")
        sizes.append(ckpt("commit", "m.pt", "--json").json["stored_bytes"])
    assert sizes[0] < 1.1 * big.numel() * 4  # two equal tensors are stored once
    assert sizes[1] < 10_000  # unchanged tensors are not stored again


def test_stats_agree_with_the_disk(ckpt: Ckpt, history: Path) -> None:
    found = ckpt("stats", "--json").json
    store = history / ".ckpt"
    assert found["cache_bytes"] == disk(store / "cache")
    assert found["stored_bytes"] == disk(store) - disk(store / "cache") - disk(store / "tmp")
    assert found["history_bytes"] == found["stored_bytes"] - found["patch_bytes"]
    entries = ckpt("log", "--json").json
    assert found["commits"] == len(entries)
    assert found["raw_bytes"] == sum(e["raw_bytes"] for e in entries)
    packs = disk(store / "packs") + disk(store / "meta")
    assert packs == sum(e["stored_bytes"] for e in entries)


def test_fresh_process_no_cache_rebuilt_index(
    ckpt_process: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt = ckpt_process
    ckpt("init")
    for number, path in enumerate(run_files[:3]):
        ckpt("commit", path, "--codec", ["lossless", "excp", "excp-max"][number % 3])

    def forms() -> list[str]:
        out = []
        for step in (2, 3):
            ckpt("checkout", step, "-o", "x.pt", "--force")
            out.append(sha(tmp_path / "x.pt"))
        return out

    first = forms()
    shutil.rmtree(tmp_path / ".ckpt" / "cache")
    assert forms() == first
    ckpt("index", "--rebuild")
    assert forms() == first
    for index in (tmp_path / ".ckpt" / "cache").glob("*.lmdb"):
        index.write_bytes(b"rotten" * 5000)
    assert forms() == first
    assert ckpt("verify", "--json").json["ok"]


def test_finding_the_repository(
    ckpt: Ckpt, history: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    below = history / "a" / "b"
    below.mkdir(parents=True)
    assert len(ckpt("log", "--json", cwd=below).json) == 5
    away = tmp_path_factory.mktemp("away")
    assert "ckpt init" in ckpt("log", cwd=away, code=3).err
    assert len(ckpt("--repo", history, "log", "--json", cwd=away).json) == 5
    assert len(ckpt("--repo", history / ".ckpt", "log", "--json", cwd=away).json) == 5
    assert len(ckpt("log", "--json", cwd=away, CKPT_DIR=str(history)).json) == 5
    ckpt("--repo", away, "log", code=3)


def test_gc_sweeps_debris_only(ckpt: Ckpt, history: Path) -> None:
    store = history / ".ckpt"
    (store / "tmp" / "left").write_bytes(b"x" * 1000)
    branch = store / "refs" / "heads" / "main"
    newest = max(branch.iterdir())
    kept = newest.read_bytes()
    newest.unlink()  # the commit at step 5 was never published
    (store / "cache" / "refs" / "heads" / "main").unlink()
    before = disk(store / "packs")
    plan = ckpt("gc", "--dry-run", "--json").json
    assert plan["dry_run"]
    assert plan["unreachable"] == ckpt("verify", "--json").json["unreachable"]
    assert len(plan["unreachable"]) == 1
    assert plan["unreachable"][0][:8] in ckpt("verify").err
    assert plan["stale_files"] == ["tmp/left"]
    assert disk(store / "packs") == before
    done = ckpt("gc", "--json").json
    assert done["freed_bytes"] == plan["freed_bytes"] > 1000
    assert ckpt("gc", "--json").json["freed_bytes"] == 0
    assert ckpt("verify", "--json").json["ok"]
    assert [e["step"] for e in ckpt("log", "--json").json] == [4, 3, 2, 1]
    newest.write_bytes(kept)
    assert ckpt("verify", code=6).out


def test_verify_names_damage(ckpt: Ckpt, history: Path) -> None:
    assert ckpt("verify", "--json").json["ok"]
    pack = max((history / ".ckpt" / "packs").rglob("*.pack"), key=lambda p: p.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    report = ckpt("verify", "--json", code=6).json
    assert not report["ok"]
    kinds = {d["what"] for d in report["damage"]}
    assert {"pack", "tensor"} <= kinds
    assert any(pack.stem in (d["name"] or "") for d in report["damage"])
    assert all(d["commit"] for d in report["damage"] if d["what"] == "tensor")


def test_help_and_version(ckpt: Ckpt) -> None:
    assert ckpt("--version").out.startswith("ckpt ")
    commands = [
        "init",
        "commit",
        "log",
        "show",
        "status",
        "checkout",
        "gc",
        "verify",
        "stats",
        "diff",
        "bisect",
    ]
    text = ckpt("--help").out
    assert all(command in text for command in commands)
    for command in commands:
        assert "--json" in ckpt(command, "--help").out


def test_output_is_json_only(ckpt: Ckpt, history: Path) -> None:
    for command in ("status", "show", "stats", "verify", "gc", "log", "tag", "branch", "diff"):
        json.loads(ckpt(command, "--json").out)
