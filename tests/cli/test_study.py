"""export, cat, average."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptvcs import InvalidInputError, Repo
from ckptvcs.history.revision import split_tensor
from tests.helpers.command_line import Ckpt, sha
from tests.helpers.comparing import same
from tests.helpers.training import train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_export_all_gives_the_files_back(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    done = ckpt("export", "--all", "out", "--json").json
    assert [row["step"] for row in done] == [1, 2, 3, 4, 5]
    assert all(row["exact"] for row in done)
    assert names(history / "out") == [f"step-{step}.pt" for step in range(1, 6)]
    for row, path in zip(done, run_files, strict=True):
        assert sha(history / row["path"]) == sha(path)
    before = {path: sha(path) for path in (history / "out").iterdir()}
    refused = ckpt("export", "--all", "out", "--start", 5, code=4)
    assert "--force" in refused.err
    assert {path: sha(path) for path in (history / "out").iterdir()} == before
    ckpt("export", "--all", "out", "--force")
    assert ckpt("export", "--all", "some", "--start", 2, "--every", 2).out.split() == [
        "some/step-2.pt",
        "some/step-4.pt",
    ]
    ckpt("export", "--all", "none", "--start", 9, code=3)
    assert not (history / "none").exists()


@pytest.mark.parametrize("codec", ["near", "lossless"])
def test_exports_are_checkouts(
    codec: str, ckpt: Ckpt, tmp_path: Path, run_files: list[Path]
) -> None:
    ckpt("init", "--codec", codec)
    for path in run_files:
        ckpt("commit", path)
    ckpt("export", "--all", "out", "--stop", "HEAD~1")
    ckpt("export", "--all", "flat", "--format", "safetensors")
    ckpt("export", "--all", "parts", "--only", "optimizer")
    for step in range(1, 5):
        ckpt("checkout", step, "-o", f"whole-{step}.pt")
        assert sha(tmp_path / f"whole-{step}.pt") == sha(tmp_path / "out" / f"step-{step}.pt")
        model = torch.load(tmp_path / f"whole-{step}.pt", weights_only=True)["model"]
        assert same(dict(model), load_file(tmp_path / "flat" / f"step-{step}.safetensors"))
        ckpt("checkout", step, "-o", f"o-{step}.pt", "--only", "optimizer")
        found = torch.load(tmp_path / "parts" / f"step-{step}.pt", weights_only=True)
        assert same(torch.load(tmp_path / f"o-{step}.pt", weights_only=True), found)


def test_export_writes_one_commit(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    assert ckpt("export", "best:loss:max", "deep/first.pt").out == "deep/first.pt\n"
    assert sha(history / "deep" / "first.pt") == sha(run_files[0])
    ckpt("export", 2, "m.safetensors")
    true = torch.load(run_files[1], weights_only=True)["model"]
    assert same(dict(true), load_file(history / "m.safetensors"))
    ckpt("export", 2, "m.safetensors", code=4)
    for wrong in (
        ["export"],
        ["export", 2],
        ["export", 2, "x.pt", "--format", "zip"],
        ["export", 2, "x.pt", "--only", "all"],
        ["export", 2, "x.pt", "--all", "d"],
        ["export", 2, "x.safetensors", "--format", "pt"],
    ):
        ckpt(*wrong, code=2)
    assert not (history / "x.pt").exists()


def test_names_of_exports_are_unique(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    for number in range(4):
        torch.save({"w": torch.full((300,), number)}, tmp_path / "m.pt")
        step = ["--step", 7] if number in (1, 2) else []
        (tmp_path / "x.dat").write_bytes(b"%d" % number * 500)
        ckpt("commit", "m.pt" if number < 2 else "x.dat", "-m", "x", *step)
    ids = {row["message"]: row["id"] for row in ckpt("log", "--json").json}
    assert ids
    ckpt("export", "--all", "out")
    assert len(names(tmp_path / "out")) == len(ckpt("log", "--json").json)


def test_directories_are_exported_as_such(ckpt: Ckpt, tmp_path: Path) -> None:
    from tests.helpers.checkpoints import trainer_directory

    ckpt("init", "--codec", "lossless")
    for state in train(2):
        folder = trainer_directory(tmp_path / "run", state, state["step"] * 100)
        ckpt("commit", folder)
    ckpt("export", "--all", "out")
    assert names(tmp_path / "out") == ["step-100", "step-200"]
    for path in (tmp_path / "run" / "checkpoint-100").iterdir():
        assert sha(path) == sha(tmp_path / "out" / "step-100" / path.name)


# -- cat -------------------------------------------------------------------------------------------


def test_cat_shows_and_writes_one_tensor(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    true = torch.load(run_files[2], weights_only=True)["model"]["0.weight"]
    shown = ckpt("cat", "3:0.weight", "--json").json
    assert (shown["name"], shown["dtype"], shown["step"]) == ("model.0.weight", "F32", 3)
    assert shown["shape"] == list(true.shape)
    assert np.array_equal(np.array(shown["values"], np.float32), true.numpy())
    assert shown["statistics"]["max"] == true.max().item()
    text = ckpt("cat", "best:loss:max~0:model.0.bias").out
    assert text.startswith("model.0.bias  F32  160  exact\n")
    ckpt("cat", "3:0.weight", "-o", "w.npy")
    assert np.array_equal(np.load(history / "w.npy"), true.numpy())
    ckpt("cat", "3:0.weight", "-o", "w.pt")
    assert same(torch.load(history / "w.pt", weights_only=True), true)
    ckpt("cat", "3:0.weight", "-o", "w.safetensors")
    assert same(load_file(history / "w.safetensors"), {"model.0.weight": true})
    ckpt("cat", "3:0.weight", "-o", "w.npy", code=4)
    ckpt("cat", "3:0.weight", "-o", "w.txt", code=2)
    assert "did you mean model.0.weight" in ckpt("cat", "3:model.0.wieght", code=3).err
    assert "nearest steps" in ckpt("cat", "9:0.weight", code=3).err
    ckpt("cat", "0.weight", code=2)
    ckpt("cat", "3:weight", code=2)


def test_cat_of_every_type(ckpt: Ckpt, tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.tensor([1.5, float("nan"), float("-inf")]).bfloat16(),
        "f16": torch.randn(3, 4).half(),
        "f64": torch.randn(200).double(),
        "bool": torch.tensor([True, False]),
        "i8": torch.tensor([-3, 4], dtype=torch.int8),
        "u8": torch.tensor([255], dtype=torch.uint8),
        "i64": torch.tensor(1 << 60),
        "c64": torch.tensor([1 + 2j]),
        "f8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 3),
        "rows": torch.arange(600.0).reshape(20, 30).T,
        "a:b": torch.ones(2),
    }
    torch.save(tensors, tmp_path / "m.pt")
    ckpt("init")
    ckpt("commit", "m.pt")
    for name, true in tensors.items():
        found = ckpt("cat", f"HEAD:{name}", "--json").json
        assert found["shape"] == list(true.shape)
        ckpt("cat", f"HEAD:{name}")
        if name == "c64":
            assert found["values"] == [[1.0, 2.0]]
        elif name == "bf16":
            assert found["values"] == [1.5, "NaN", "-Infinity"]
            assert found["statistics"]["not_finite"] == 2
        else:
            assert torch.equal(
                torch.tensor(found["values"]).reshape(true.shape).double(), true.double()
            )
        ckpt("cat", f"HEAD:{name}", "-o", f"{name}.npy")
        ckpt("cat", f"HEAD:{name}", "-o", f"{name}.pt")
        back = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert same(back, true.contiguous())


@pytest.mark.parametrize(
    ("text", "revision", "tensor"),
    [
        ("2000:model.w", "2000", "model.w"),
        ("step:2000:model.w", "step:2000", "model.w"),
        ("best:loss:min:model.w", "best:loss:min", "model.w"),
        ("best:loss:max~2:a:b:c", "best:loss:max~2", "a:b:c"),
        ("best:loss:model.w", "best:loss", "model.w"),
        ("best:val/loss:min:x", "best:val/loss:min", "x"),
        ("id:1a2b:file.pt:w", "id:1a2b", "file.pt:w"),
        ("best:w", "best", "w"),
        ("main@20~1:dir/f.pt:w.x", "main@20~1", "dir/f.pt:w.x"),
        ("HEAD::", "HEAD", ":"),
    ],
)
def test_where_a_revision_ends(text: str, revision: str, tensor: str) -> None:
    assert split_tensor(text) == (revision, tensor)


@pytest.mark.parametrize("text", ["", ":", "x", "x:", ":x", "best"])
def test_what_names_no_tensor(text: str) -> None:
    with pytest.raises(InvalidInputError):
        split_tensor(text)


# -- average ---------------------------------------------------------------------------------------


def test_average_writes_the_mean_of_a_range(
    ckpt: Ckpt, history: Path, run_files: list[Path]
) -> None:
    states = [torch.load(path, weights_only=True) for path in run_files]
    done = ckpt("average", "2..4", "-o", "mean.pt", "--json").json
    assert done["steps"] == [2, 3, 4]
    found = torch.load(history / "mean.pt", weights_only=True)
    assert zipfile.ZipFile(history / "mean.pt").testzip() is None
    newest = states[3]
    assert found.keys() == newest.keys()
    assert same(found["optimizer"], newest["optimizer"])
    assert same(found["rng"], newest["rng"])
    assert list(found["model"]) == list(newest["model"])
    for name, value in newest["model"].items():
        if "running" in name or not value.is_floating_point():
            assert same(found["model"][name], value)
        else:
            total = sum(state["model"][name].double() for state in states[1:4])
            assert same(found["model"][name], (total / 3).float())
    ckpt("average", "2..4", "-o", "mean.pt", code=4)
    ckpt("average", "1..5", "--every", 2, "-o", "mean.safetensors")
    flat = load_file(history / "mean.safetensors")
    total = (states[1]["model"]["0.weight"].double() + states[3]["model"]["0.weight"]) / 2
    assert same(flat["0.weight"], total.float())
    ckpt("average", "8..9", "-o", "no.pt", code=3)
    for text in ("", "8", "1.2", "1..2..3", "1....2"):
        ckpt("average", text, "-o", "no.pt", code=2)
    assert json.loads(ckpt("average", "HEAD..HEAD", "-o", "one.pt", "--json").out)
    assert sha(history / "one.pt") == sha(run_files[4])


def weighted(states: list[Any], factors: list[float], name: str) -> torch.Tensor:
    rows = zip(states, factors, strict=True)
    total = torch.stack([factor * state["model"][name].double() for state, factor in rows])
    return total.sum(0).float()


def test_average_with_weights(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    states = [torch.load(path, weights_only=True) for path in run_files]

    def mean(*args: object) -> torch.Tensor:
        ckpt("average", *args, "-o", "mean.safetensors", "-f")
        return load_file(history / "mean.safetensors")["0.weight"]

    def expect(found: torch.Tensor, factors: list[float]) -> None:
        chosen = states[-len(factors) :]
        assert torch.allclose(found, weighted(chosen, factors, "0.weight"), rtol=0, atol=1e-7)

    expect(mean("--last", 2, "--weights", "1,3"), [0.25, 0.75])
    expect(mean("--last", 4, "--like", "cosine"), Repo.decay_weights("cosine", 4))
    expect(mean("4..5", "--like", "inverse-sqrt"), [2**-0.5, 1 - 2**-0.5])
    assert same(mean("2..5", "--like", "linear"), mean("--last", 4))
    assert same(mean("2..5", "--last", 1), states[4]["model"]["0.weight"])
    wrong: list[tuple[list[object], str]] = [
        (["--last", 2, "--weights", "1,2,3"], "3 weights for 2 commits"),
        (["--last", 2, "--weights", "1,-1"], "no positive sum"),
        (["--last", 2, "--weights", "nan,1"], "no positive sum"),
        (["--last", 2, "--weights", "a,b"], "invalid weights"),
        (["--last", 2, "--weights", "1,2", "--like", "cosine"], "exclude each other"),
        (["--last", 2, "--like", "cubic"], "unknown decay 'cubic'"),
        (["--last", 0], "0"),
        ([], "no commits are named"),
    ]
    for args, words in wrong:
        assert words in ckpt("average", *args, "-o", "no.pt", code=2).err
    assert not (history / "no.pt").exists()


def test_average_of_the_best(ckpt: Ckpt, history: Path) -> None:
    for step, (loss, score) in enumerate([(3, 1), (1, 2), (2, 3), (5, 9)], 1):
        ckpt("note", step, "--metric", f"cost={loss}", "--metric", f"score={score}")

    def steps(*args: object) -> list[int]:
        found: list[int] = ckpt("average", *args, "-o", "b.pt", "-f", "--json").json["steps"]
        return found

    assert steps("--best", "cost:2") == [2, 3]
    assert steps("--best", "cost") == [2]
    assert steps("--best", "score:max:3") == [2, 3, 4]
    assert steps("3..5", "--best", "cost:min:9") == [3, 4]
    assert "has the metric 'none'" in ckpt("average", "--best", "none:2", "-o", "x.pt", code=3).err


@pytest.mark.parametrize("like", ["linear", "cosine", "inverse-sqrt"])
def test_weights_of_a_decay(like: str) -> None:
    for count in (1, 2, 7, 50):
        weights = Repo.decay_weights(like, count)
        assert len(weights) == count
        assert sum(weights) == pytest.approx(1)
        assert min(weights) > 0
        rates = np.cumsum(weights[::-1])[::-1]  # of the updates before each checkpoint
        assert rates[0] == pytest.approx(1)
        assert (np.diff(rates) < 0).all()
    assert Repo.decay_weights("linear", 4) == pytest.approx([0.25] * 4)


def test_average_of_other_types(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init", "--codec", "lossless")
    rows = []
    for step in range(1, 4):
        row = {
            "b": torch.randn(300).bfloat16(),
            "h": torch.randn(300).half(),
            "d": torch.randn(300).double(),
            "n": torch.full((300,), step),
        }
        row["b"][0], row["b"][1], row["h"][0] = float("nan"), float("inf"), 60000
        rows.append(row)
        save_file(row, tmp_path / "m.safetensors")
        ckpt("commit", "m.safetensors", "--step", step)
    ckpt("average", "..", "-o", "mean.safetensors")
    ckpt("average", "..", "-o", "mean.pt")
    found = load_file(tmp_path / "mean.safetensors")
    for name in ("b", "h"):
        total = torch.stack([row[name].double() for row in rows]).sum(0) / 3
        true = total.float().to(rows[0][name].dtype)
        assert torch.equal(found[name].isnan(), true.isnan())
        assert torch.equal(found[name].nan_to_num(), true.nan_to_num())
    assert same(found["n"], rows[2]["n"])
    assert same(torch.load(tmp_path / "mean.pt", weights_only=True)["h"], found["h"])
    save_file({"b": torch.zeros(7, 100)}, tmp_path / "m.safetensors")
    ckpt("commit", "m.safetensors", "--step", 4)
    assert "one architecture" in ckpt("average", "1..4", "-o", "x.pt", code=2).err
    assert not (tmp_path / "x.pt").exists()


def test_average_of_a_directory(ckpt: Ckpt, tmp_path: Path) -> None:
    from tests.helpers.checkpoints import trainer_directory

    ckpt("init", "--codec", "lossless")
    for state in train(2):
        ckpt("commit", trainer_directory(tmp_path / "run", state, state["step"] * 100))
    ckpt("average", "..", "-o", "mean")
    last = tmp_path / "run" / "checkpoint-200"
    assert names(tmp_path / "mean") == names(last)
    changed = {p.name for p in last.iterdir() if sha(p) != sha(tmp_path / "mean" / p.name)}
    assert len(changed) == 1


def test_no_torch_where_numpy_is_enough(ckpt_process: Ckpt, history: Path) -> None:
    for command in (
        ["export", "--all", "out"],
        ["cat", "3:0.weight"],
        ["cat", "3:0.weight", "-o", "w.pt"],
        ["average", "1..3", "-o", "m.pt"],
        ["export", "3", "m.safetensors"],
    ):
        code = (
            "import sys\nfrom ckptvcs.cli.app import app\n"
            f"try: app({command!r})\nexcept SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        import subprocess
        import sys

        done = subprocess.run([sys.executable, "-c", code], cwd=history, capture_output=True)
        assert done.returncode == 0, done


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats")
def test_cat_shows_both_numbers_of_a_byte(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    packed = torch.tensor([[0x21, 0x7F], [0x98, 0x00]], dtype=torch.uint8)
    save_file({"four": packed.view(torch.float4_e2m1fn_x2)}, tmp_path / "a.safetensors")
    ckpt("commit", "a.safetensors", "-m", "x", "--step", 1)
    found = ckpt("cat", "1:four", "--json").json
    assert (found["dtype"], found["shape"], found["fidelity"]) == ("F4", [2, 2], "exact")
    assert found["values"] == [[0.5, 1.0, -6.0, 6.0], [-0.0, -0.5, 0.0, 0.0]]
    ckpt("cat", "1:four", "-o", "four.npy")
    assert np.load(tmp_path / "four.npy").tolist() == found["values"]


def test_a_suffix_chooses_the_format(ckpt: Ckpt, history: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    done = ckpt("checkout", 2, "-o", "m.safetensors")
    assert "note: m.safetensors gets the weights only" in done.err
    ckpt("export", 2, "n.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == load_file("n.safetensors").keys()
    assert ckpt("log", "-n", 1, "--json").json[0]["step"] == 5
    ckpt("commit", "m.safetensors", "--step", 6)
    ckpt("checkout", 6, "-o", "back.pt")
    assert torch.load(tmp_path / "back.pt").keys() == load_file("m.safetensors").keys()
    for name in ("same", "same.ckpt", "same.pt.bak", "same.1000"):
        ckpt("checkout", 2, "-o", name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "same").read_bytes()


@pytest.mark.parametrize("suffix", [".onnx", ".npz", ".txt", ".ONNX"])
def test_an_unknown_suffix_is_refused(
    suffix: str, ckpt: Ckpt, history: Path, tmp_path: Path
) -> None:
    target = f"model{suffix}"
    for command in (["checkout", 2, "-o"], ["export", 2], ["average", "1..2", "-o"]):
        done = ckpt(*command, target, code=2)
        assert done.err.splitlines() == [
            f"error: {target} has an unknown suffix",
            "hint: use .pt or .safetensors",
        ]
    assert not (tmp_path / target).exists()


def test_bytes_keep_their_own_suffix(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "notes.txt").write_text("halve the rate")
    ckpt("commit", "notes.txt")
    ckpt("checkout", "HEAD", "-o", "again.txt")
    assert (tmp_path / "again.txt").read_text() == "halve the rate"
    assert "holds no tensors" in ckpt("checkout", "HEAD", "-o", "x.pt", code=2).err
    assert "or .txt" in ckpt("checkout", "HEAD", "-o", "x.onnx", code=2).err
