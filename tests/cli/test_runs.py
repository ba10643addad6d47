"""Folders as trainers write them, by the command line: files that are one checkpoint, steps in
paths, runs that begin again.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.command_line import Ckpt

STEPS = (10, 20, 30, 40)


def moving(size: int = 160) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Step, weight and moments of a run of Adam, at each of `STEPS`."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=draw) * 0.05
    m, v = torch.zeros(size, size), torch.zeros(size, size)
    for step in range(1, max(STEPS) + 1):
        g = torch.randn(size, size, generator=draw) * 1e-3
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 1e-4 * m / (v.sqrt() + 1e-8)
        if step in STEPS:
            yield step, w.clone(), m.clone(), v.clone()


def optimizer(m: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    state = {0: {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v}}
    return {"state": state, "param_groups": [{"params": [0], "betas": (0.9, 0.999)}]}


def save(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(ckpt: Ckpt, *args: object) -> list[tuple[str, int | None, str]]:
    """Message, step and branch of commits, the oldest first."""
    found = ckpt("log", "--json", *args).json
    return [(entry["message"], entry["step"], entry["branch"]) for entry in found[::-1]]


# -- files that are one checkpoint -----------------------------------------------------------------


def sharded(out: Path, form: str, *, steps: tuple[int, ...] = (100, 200), count: int = 4) -> None:
    draw = torch.Generator().manual_seed(0)
    for step in steps:
        for shard in range(count):
            save(
                out / form.format(step=step, shard=shard),
                {"model": {"flat": torch.randn(2000, generator=draw)}},
            )


@pytest.mark.parametrize(
    "form",
    [
        "checkpoint_3_{step}-model_part-0-shard{shard}.pt",
        "ep0-ba{step}-rank{shard}.pt",
        "model_0000{step}.rank_{shard}.pth",
        "step{step}-0000{shard}-of-00004.bin",
    ],
)
def test_shards_are_one_commit_of_their_step(ckpt: Ckpt, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    sharded(out, form)
    before = contents(out)
    ckpt("init", "--codec", "lossless")
    found = ckpt("import", "out", "--json").json
    assert [(one["step"], one["kind"]) for one in found["checkpoints"]] == [
        (100, "files"),
        (200, "files"),
    ]
    assert [(step, branch) for _, step, branch in rows(ckpt, "--all")] == [
        (100, "main"),
        (200, "main"),
    ]
    for step in (100, 200):
        ckpt("checkout", step, "-o", f"back{step}")
    back = contents(tmp_path / "back100") | contents(tmp_path / "back200")
    assert back == before
    done = ckpt("import", "out", "--delete-originals")
    assert done.err.count("removed: ") == 8
    assert not contents(out)
    ckpt("checkout", 100)
    assert contents(out) == contents(tmp_path / "back100")
    assert "no changes: the files match HEAD" in ckpt("status").out


def test_the_files_of_guided_diffusion(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step, w, m, v in moving():
        number = f"{1000 * step:06}"
        save(out / f"model{number}.pt", {"w": w})
        save(out / f"ema_0.9999_{number}.pt", {"w": 0.9 * w})
        save(out / f"opt{number}.pt", optimizer(m, v))
    ckpt("init")
    ckpt("import", "out")
    assert rows(ckpt, "--all") == [(f"*0{1000 * step}.pt", 1000 * step, "main") for step in STEPS]
    log = ckpt("log", "--json").json
    assert [entry["kind"] for entry in log] == ["delta", "delta", "delta", "keyframe"]
    before = contents(out)
    for path in out.iterdir():
        path.unlink()
    ckpt("checkout", 40000)
    assert contents(out) == {name: data for name, data in before.items() if "040000" in name}


def test_what_is_left_of_files_that_were_committed_is_known(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (10000, 20000):
        for name in ("model", "opt", "ema_0.9999_"):
            save(out / f"{name}{step:06}.pt", {"w": torch.full((3000,), float(step + len(name)))})
    ckpt("init")
    ckpt("import", "out")
    (out / "opt010000.pt").unlink()
    (out / "ema_0.9999_010000.pt").unlink()
    (out / "opt020000.pt").unlink()
    found = ckpt("import", "out", "--json").json["checkpoints"]
    assert [one["action"] for one in found] == ["known", "known"]
    save(out / "model010000.pt", {"w": torch.zeros(3000)})  # another one of its name
    found = ckpt("import", "out", "--json").json["checkpoints"]
    assert [one["action"] for one in found] == ["committed", "known"]


@pytest.mark.parametrize("way", ["empty", "cut", "missing", "last", "all"])
def test_incomplete_shards_are_one_report(ckpt: Ckpt, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    sharded(out, "checkpoint_1_{step}-shard{shard}.pt", steps=(100, 200, 300))
    sharded(out, "checkpoint_last-shard{shard}.pt", steps=(0,))
    for shard in range(4) if way == "all" else [3] if way == "last" else [1]:
        path = out / f"checkpoint_1_200-shard{shard}.pt"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if way in ("cut", "all") else b"")
        if way in ("missing", "last"):
            path.unlink()
    ckpt("init")
    done = ckpt("import", "out", code=2)
    assert done.err.count("error: ") == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "checkpoint_1_200-shard*.pt is incomplete: " in line
    assert ("and 1 more" in line) == (way == "all")
    assert ("shard1.pt" in line) == (way != "last")
    assert {step for _, step, _ in rows(ckpt, "--all")} == {100, 300, None}
    assert len(rows(ckpt, "--all")) == 3


def test_a_run_on_fewer_processes_is_complete(ckpt: Ckpt, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    for step, count in ((100, 4), (200, 4), (300, 2)):
        for rank in range(count):
            save(
                tmp_path / "out" / f"step{step}-rank{rank}.pt",
                {"w": torch.randn(8000 // count, generator=draw)},
            )
    ckpt("init")
    ckpt("import", "out")
    assert [step for _, step, _ in rows(ckpt)] == [100, 200, 300]


def test_shards_of_a_directory_are_no_checkpoint(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    sharded(tmp_path / "out", "model-0000{shard}-of-00009.safetensors", steps=(0,), count=3)
    save(tmp_path / "out" / "step-3.pt", {"w": torch.ones(3)})
    left = ckpt("import", "out", "--json").json["skipped"]
    assert {one["reason"] for one in left} == {"a piece of a checkpoint, not one by itself"}
    for name in ("mp_rank_00_model_states.pt", "mp_rank_00/model_optim_rng.pt"):
        save(tmp_path / "one" / name, {"w": torch.ones(3)})
        assert "is a checkpoint itself" in ckpt("import", "one", code=2).err
        shutil.rmtree(tmp_path / "one")


def test_files_that_end_in_tar(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for epoch in (1, 2):  # as the example of ImageNet writes them: epochs
        save(
            out / f"checkpoint_{epoch:04}.pth.tar",
            {"epoch": epoch + 1, "model": {"w": torch.full((300,), float(epoch))}},
        )
    save(out / "iter_300.pth.tar", {"w": torch.ones(300)})
    with tarfile.open(out / "logs.tar", "w") as archive:
        archive.add(__file__, "x.py")
    ckpt("init")
    found = ckpt("import", "out", "--json").json
    assert [(one["name"], one["step"]) for one in found["checkpoints"]] == [
        ("iter_300.pth.tar", 300),
        ("checkpoint_0001.pth.tar", None),
        ("checkpoint_0002.pth.tar", None),
    ]
    assert found["skipped"] == [{"name": "logs.tar", "reason": "a tar archive"}]


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("checkpoint_6_182000.pt", {}, 182000),
        ("checkpoint_6_182000.pt", {"step": 7}, 7),
        ("checkpoint_best.pt", {"optimizer_history": [{"num_updates": 50}]}, 50),
        ("ep0-ba200-rank0.pt", {}, 200),
        ("epoch_12.pth", {}, None),
        ("llama-7b.pt", {}, None),
        ("checkpoint_12.pth.tar", {"epoch": 12}, None),
        ("epoch_12.pth", {"meta": {"iter": 9}}, 9),
        ("resnet50-0676ba61.pth", {}, None),
        ("model_0004999.pth", {}, 4999),
        ("multiberts-seed_0-step_100k", {}, 100_000),
        ("step-001000-2BT", {}, 1000),
    ],
)
def test_the_step_of_a_single_commit(
    ckpt: Ckpt, tmp_path: Path, name: str, state: dict[str, Any], step: int | None
) -> None:
    ckpt("init")
    save(tmp_path / name, {"w": torch.ones(300)} | state)
    assert ckpt("commit", name, "-m", "x", "--json").json["step"] == step


@pytest.mark.parametrize(
    ("name", "text", "step"),
    [
        ("latest", "global_step700", 700),
        ("latest_checkpointed_iteration.txt", "800\n", 800),
        ("metadata.json", '{"step": 900}', 900),
        ("latest", "x" * 1000, None),
        ("latest", "9" * 60, None),
        ("latest", "", None),
        ("metadata.json", "[1]", None),
    ],
)
def test_the_step_that_a_file_beside_the_tensors_gives(
    ckpt: Ckpt, tmp_path: Path, name: str, text: str, step: int | None
) -> None:
    ckpt("init")
    save(tmp_path / "run" / "weights.pt", {"w": torch.ones(300)})
    (tmp_path / "run" / name).write_text(text)
    assert ckpt("commit", "run", "-m", "x", "--json").json["step"] == step


# -- steps in the paths of files -------------------------------------------------------------------

LAYOUTS = {
    "deepspeed": (
        "checkpoint-{0}/global_step{0}/mp_rank_00_model_states.pt",
        "checkpoint-{0}/global_step{0}/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
    "megatron": (
        "iter_{0:07}/iter_{0:07}/mp_rank_00/model_optim_rng.pt",
        "iter_{0:07}/iter_{0:07}/mp_rank_00/distrib_optim.pt",
    ),
    "universal": (
        "step_{0}/global_step{0}_universal/mp_rank_00_model_states.pt",
        "step_{0}/global_step{0}_universal/zero/w/state.pt",
    ),
    "names": ("ckpt_{0}/model-step{0:05}.pt", "ckpt_{0}/optim-step{0:05}.pt"),
    "nested": ("step-{0}/run/checkpoint_2_{0}/model.pt", "step-{0}/run/checkpoint_2_{0}/opt.pt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_in_paths_do_not_make_keyframes(ckpt: Ckpt, tmp_path: Path, layout: str) -> None:
    model, other = LAYOUTS[layout]
    ckpt("init")
    for step, w, m, v in moving():
        save(tmp_path / model.format(step), {"module": {"w": w}})
        save(tmp_path / other.format(step), optimizer(m, v))
        top = model.format(step).partition("/")[0]
        (tmp_path / top / "rng_state_0.pth").write_bytes(b"x" * step)
        ckpt("commit", top, "-m", top)
    log = ckpt("log", "--json").json
    assert [entry["step"] for entry in log] == list(STEPS[::-1])
    assert [entry["kind"] for entry in log] == ["delta", "delta", "delta", "keyframe"]
    assert all(entry["stored_bytes"] < log[-1]["stored_bytes"] / 3 for entry in log[:-1])
    diff = ckpt("diff", "--json").json
    assert (diff["added"], diff["removed"]) == ([], [])
    weight = f"{model.partition('/')[2]}:module.w"
    names = {tensor["name"] for tensor in diff["tensors"]}
    assert weight.format(30) in names  # the real one, of the first of the two
    for step in STEPS:
        found = ckpt("cat", f"{step}:module.w", "--json").json
        assert found["name"] == weight.format(step)
        assert (
            found["values"] == ckpt("cat", f"{step}:{weight.format(10)}", "--json").json["values"]
        )
    assert [w["name"] for w in ckpt("show", "--json").json["tensors"] if w["role"] == "weight"] == [
        weight.format(40)
    ]
    ckpt("average", "10..40", "-o", "mean")
    assert (tmp_path / "mean" / model.partition("/")[2].format(40)).is_file()
    exact = contents(tmp_path / model.format(40).partition("/")[0])
    ckpt("checkout", "40", "-o", "back")
    assert contents(tmp_path / "back") == exact
    ckpt("gc", "--keep-every", "40", "--keep-last", "1", "--rekey", "--now")
    ckpt("gc", "--keep-every", "20", "--rekey", "--now")
    ckpt("verify")


def test_rekeying_finds_the_tensors_of_another_step(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    for step, w, _, _ in moving():
        save(tmp_path / f"checkpoint-{step}" / f"global_step{step}" / "m.pt", {"w": w.bfloat16()})
        ckpt("commit", f"checkpoint-{step}", "-m", "x")
    before = ckpt("log", "--json").json
    ckpt("gc", "--keep-every", "20", "--keep-last", "1", "--rekey", "--now")
    ckpt("verify")
    after = {entry["step"]: entry for entry in ckpt("log", "--json").json}
    assert set(after) == {20, 40}
    whole = before[-1]["stored_bytes"]
    assert min(one["stored_bytes"] for one in after.values()) <= whole
    total = ckpt("stats", "--json").json["stored_bytes"]
    assert total < 2 * whole  # the second of them stands on the first


def test_series_and_trajectories_cross_steps_in_paths(tmp_path: Path) -> None:
    from ckptvcs import Repo

    repo = Repo.init(tmp_path, codec="lossless")
    weights = {}
    for step, w, m, v in moving(40):
        top = tmp_path / f"checkpoint-{step}"
        save(top / f"global_step{step}" / "mp_rank_00_model_states.pt", {"module": {"w": w}})
        save(top / f"global_step{step}" / "zero_optim_states.pt", optimizer(m, v))
        repo.commit_path(top, message="x")
        weights[step] = w
    for name in ("module.w", "global_step20/mp_rank_00_model_states.pt:module.w"):
        found = {entry.step: value for entry, value in repo.series(name)}
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[step], w) for step, w in weights.items())
    for entry, state in repo.trajectory():
        inner = state[f"global_step{entry.step}/mp_rank_00_model_states.pt"]
        assert torch.equal(inner["module"]["w"], weights[entry.step or 0])
    for entry, state in repo.trajectory("*module.w"):
        assert list(state) == [f"global_step{entry.step}/mp_rank_00_model_states.pt:module.w"]


# -- runs that begin again -------------------------------------------------------------------------


def watch(ckpt: Ckpt, *args: object, code: int = 0) -> str:
    options = ("--once", "--settle", "0.05", "--accept-near", *args)
    return ckpt("watch", "out", *options, code=code).err


def test_a_restart_from_step_0_keeps_what_is_new(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt("init")
    torch.manual_seed(0)
    for number, step in enumerate((500, 600, 700, 100, 200, 300)):
        save(out / f"checkpoint-{step}.pt", {"model": {"w": torch.randn(80, 80)}, "step": step})
        watch(ckpt, "--keep-local", 2)
        assert len(list(out.iterdir())) == min(number + 1, 2)
        assert f"checkpoint-{step}.pt" in contents(out)
    assert set(contents(out)) == {"checkpoint-200.pt", "checkpoint-300.pt"}
    assert [step for _, step, _ in rows(ckpt)] == [100, 200, 300]


def test_series_of_names_have_a_line_each(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt("init")
    torch.manual_seed(0)
    for step in (100, 200, 300):
        for name in (f"step-{step}.pt", f"step-{step}-ema.pt", "best.pt"):
            if name != "best.pt" or step == 200:
                save(out / name, {"model": {"w": torch.randn(80, 80)}, "step": step})
        watch(ckpt, "--keep-local", 4)
    assert [message for message, _, _ in rows(ckpt)] == [
        "step-100.pt",
        "step-200.pt",
        "step-300.pt",
    ]
    lines = {branch for _, _, branch in rows(ckpt, "--all")}
    assert lines == {"main", "main-2", "main-3"}
    side = [message for message, _, _ in rows(ckpt, "main-2")]
    assert side == ["step-100-ema.pt", "step-200-ema.pt", "step-300-ema.pt"]
    assert ckpt("status", "--json").json["branch"] == "main"
    assert set(contents(out)) == {
        "best.pt",
        "step-200.pt",
        "step-200-ema.pt",
        "step-300.pt",
        "step-300-ema.pt",
    }
    save(out / "step-50.pt", {"model": {"w": torch.randn(80, 80)}, "step": 50})  # begins again
    watch(ckpt, "--keep-local", 1)
    assert set(contents(out)) == {"best.pt", "step-50.pt"}


def test_shards_are_watched_and_removed_together(ckpt: Ckpt, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt("init")
    for step in (100, 200, 300):
        sharded(out, "ep0-ba{step}-rank{shard}.pt", steps=(step,), count=3)
        watch(ckpt, "--keep-local", 1)
    assert rows(ckpt, "--all") == [
        (f"ep0-ba{step}-rank*.pt", step, "main") for step in (100, 200, 300)
    ]
    assert set(contents(out)) == {f"ep0-ba300-rank{rank}.pt" for rank in range(3)}
    (out / "ep0-ba300-rank2.pt").write_bytes(b"")
    said = watch(ckpt, "--keep-local", 1, code=2)
    assert said.count("error: ") == 1
    assert len(rows(ckpt, "--all")) == 3
