"""`ckpt import` as a user sees it: text, JSON, exit codes, questions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.command_line import COMMIT_KEYS, Ckpt, disk, environment

ITEM_KEYS = {
    "name",
    "step",
    "kind",
    "raw_bytes",
    "action",
    "same_as",
    "branch",
    "commit",
    "estimate",
    "problem",
    "notes",
    "removed",
    "keep_reason",
    "pinned",
}


@pytest.fixture
def folder(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> Path:
    """A repository in `tmp_path`, and in it a folder of five checkpoints, step 8 to 12."""
    ckpt("init")
    ckpt("config", "max-weight-error", "off")  # the weights of a model this small move far
    (tmp_path / "run").mkdir()
    for number, path in enumerate(run_files, start=8):
        shutil.copy(path, tmp_path / "run" / f"step-{number}.pt")
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_import_shows_a_row_for_each_checkpoint(ckpt: Ckpt, folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    shutil.copy(folder / "step-9.pt", folder / "best.pt")
    done = ckpt("import", "run")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["step", "name", "size", "stored", "ratio", "fidelity", "note"]
    assert [row[1] for row in rows[1:-2]] == [
        "step-8.pt",
        "step-9.pt",
        "best.pt",
        "step-10.pt",
        "step-11.pt",
        "step-12.pt",
    ]
    assert "as step-9.pt" in done.out
    assert [row[-3:] for row in rows[-4:-2]] == [["exact", "for", "now"]] * 2
    assert "near 0.0" in done.out
    assert rows[-2][:4] == ["5", "committed,", "1", "known:"]
    assert done.err == "skipped: notes.txt: not a .pt, .pth, .bin, .ckpt, .safetensors file\n"
    assert [e["step"] for e in ckpt("log", "--json").json] == [12, 11, 10, 9, 8]


def test_import_reports_checkpoints_and_skipped_files_as_json(ckpt: Ckpt, folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "cut.pt").write_bytes((folder / "step-9.pt").read_bytes()[:1000])
    done = ckpt("import", "run", "--json", code=2)
    found = done.json
    assert found.keys() == {
        "dry_run",
        "raw_bytes",
        "stored_bytes",
        "freed_bytes",
        "checkpoints",
        "skipped",
        "estimate",
    }
    assert found["skipped"] == [
        {"name": "notes.txt", "reason": "not a .pt, .pth, .bin, .ckpt, .safetensors file"}
    ]
    assert all(item.keys() == ITEM_KEYS for item in found["checkpoints"])
    *made, cut = found["checkpoints"]
    assert [item["action"] for item in made] == ["committed"] * 5
    assert [item["step"] for item in made] == [8, 9, 10, 11, 12]
    assert all(item["commit"].keys() >= COMMIT_KEYS for item in made)
    assert [item["commit"]["exact"] for item in made] == [False, False, False, True, True]
    assert made[0]["commit"]["error"]["weight_rel"] > 0
    assert (cut["action"], cut["commit"]) == ("failed", None)
    assert "incomplete" in cut["problem"]
    assert "error: cut.pt: run/cut.pt is incomplete" in done.err
    assert found["raw_bytes"] == sum(item["raw_bytes"] for item in made)
    assert found["stored_bytes"] == sum(item["commit"]["stored_bytes"] for item in made)


def test_a_dry_run_changes_nothing(ckpt: Ckpt, folder: Path, tmp_path: Path) -> None:
    def state() -> tuple[list[str], int, list[str]]:
        store = tmp_path / ".ckpt"
        return names(folder), disk(store), sorted(str(p) for p in store.rglob("*"))

    before = state()
    found = ckpt("import", "run", "--dry-run", "--delete-originals", "--json").json
    assert found["dry_run"]
    assert {item["action"] for item in found["checkpoints"]} == {"commit"}
    assert "5 to be committed" in ckpt("import", "run", "--dry-run").out
    assert state() == before
    ckpt("import", "run")
    before = state()
    shown = ckpt("import", "run", "--dry-run", "--delete-originals")
    assert shown.out.count("known, stays") == 3
    assert shown.out.count("known, would go") == 2
    shown = ckpt("import", "run", "--dry-run", "--delete-originals", "--accept-near")
    assert shown.out.count("known, would go") == 5
    assert state() == before


def test_import_deletes_near_originals_only_if_told(ckpt: Ckpt, folder: Path) -> None:
    ckpt("import", "run")
    done = ckpt("import", "run", "--delete-originals", code=4)
    assert names(folder) == ["step-10.pt", "step-8.pt", "step-9.pt"]
    assert "removed: step-11.pt (kept exact)" in done.err
    assert "not removed: step-8.pt: its commit is only near (weights off by 0.0" in done.err
    assert "hint: add --accept-near" in done.err
    assert done.err.count("pinned: ") == 2
    assert "2 files removed" in done.out
    assert "3 originals kept" in done.out
    found = ckpt("import", "run", "--delete-originals", "--accept-near", "--json")
    assert names(folder) == []
    assert [item["removed"] for item in found.json["checkpoints"]] == [
        ["step-8.pt"],
        ["step-9.pt"],
        ["step-10.pt"],
    ]
    assert "removed: step-8.pt (kept near 0.0" in found.err
    assert found.json["freed_bytes"] == found.json["raw_bytes"]
    assert ckpt("verify", "--json").json["ok"]
    assert "no checkpoints" in ckpt("import", "run", code=3).err
    assert "missing: " in ckpt("status").out


def test_import_keeps_exact_what_it_deletes(ckpt: Ckpt, folder: Path) -> None:
    done = ckpt("import", "run", "--delete-originals")
    assert names(folder) == []
    assert done.err.count("(kept exact)") == done.err.count("pinned: ") == 5
    assert [entry["exact_lasts"] for entry in ckpt("log", "--json").json] == [True] * 5


def test_a_dry_run_estimates_the_import(ckpt: Ckpt, folder: Path) -> None:
    options = ("import", "run", "--delete-originals", "--accept-near")
    plan = ckpt(*options, "--dry-run", "--json").json
    shown = ckpt(*options, "--dry-run")
    assert "estimate: " in shown.out
    assert "would remove 5 of 5 originals" in shown.out
    assert "the estimate is based on step-8.pt, step-9.pt" in shown.err
    assert shown.out.count("new, would go") == 5
    assert plan["estimate"]["sampled"] == ["step-8.pt", "step-9.pt"]
    done = ckpt(*options, "--json").json
    for planned, made in zip(plan["checkpoints"], done["checkpoints"], strict=True):
        row, commit = planned["estimate"], made["commit"]
        assert made["estimate"] is None
        assert row["exact"] == commit["exact"]
        assert row["exact_lasts"] == commit["exact_lasts"]
        assert 0.3 < row["stored_bytes"] / commit["stored_bytes"] < 3
        assert row["exact_bytes"] == 0 or 0.3 < row["exact_bytes"] / commit["exact_bytes"] < 3


def test_a_dry_run_says_what_stays(ckpt: Ckpt, folder: Path) -> None:
    ckpt("config", "pin-fidelity", "near")
    plan = ckpt("import", "run", "--delete-originals", "--dry-run")
    assert plan.out.count("new, stays") == 5
    assert "would remove 0 of 5 originals" in plan.out
    exact = ckpt("import", "run", "--delete-originals", "--codec", "lossless", "--dry-run")
    assert exact.out.count("new, would go") == 5


def test_a_near_import_cannot_become_lossless(ckpt: Ckpt, folder: Path) -> None:
    ckpt("import", "run")
    done = ckpt("import", "run", "--codec", "lossless")
    assert "0 committed, 5 known" in done.out
    assert "hint: import into a new repository to keep 3 known checkpoints exact" in done.err


def test_what_failed_is_kept_and_says_so_once(ckpt: Ckpt, folder: Path) -> None:
    (folder / "cut.pt").write_bytes((folder / "step-9.pt").read_bytes()[:1000])
    done = ckpt("import", "run", "--delete-originals", "--codec", "lossless", code=2)
    assert names(folder) == ["cut.pt"]
    assert done.err.count("incomplete") == 1


def test_damage_has_its_code(ckpt: Ckpt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptvcs.decode.commit_reader import Restorer

    monkeypatch.setattr(Restorer, "write_file", lambda *_: "0" * 64)
    done = ckpt("import", "run", "--delete-originals", "--codec", "lossless", code=6)
    assert "is not restored bit for bit" in done.err
    assert len(names(folder)) == 5


@pytest.mark.parametrize(("answer", "left"), [("n", 5), ("y", 0)])
def test_a_terminal_is_asked(
    ckpt: Ckpt, folder: Path, answer: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def confirm(text: str, **_: object) -> bool:
        asked.append(text)
        return answer == "y"

    ckpt("import", "run", "--codec", "lossless")
    monkeypatch.setattr("ckptvcs.cli.render.can_ask", lambda: True)
    monkeypatch.setattr("typer.confirm", confirm)
    ckpt("import", "run", "--delete-originals", code=4 if left else 0)
    assert len(asked) == 1
    assert asked[0].startswith("remove 5 of 5 originals, ")
    assert len(names(folder)) == left
    if left:
        ckpt("import", "run", "--delete-originals", "--yes")
        assert len(asked) == 1
        assert names(folder) == []


def test_the_question_says_how_near(
    ckpt: Ckpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ckptvcs.cli.render.can_ask", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text))
    ckpt("import", "run", "--delete-originals", "--accept-near", code=4)
    assert "remove 5 of 5 originals" in asked[0]
    assert "3 of them only near (relative weight error up to 0.0" in asked[0]
    assert len(names(folder)) == 5


def test_wrong_arguments_import_nothing(ckpt: Ckpt, folder: Path) -> None:
    assert "--delete-originals" in ckpt("import", "run", "--accept-near", code=2).err
    assert "ckpt commit" in ckpt("import", "run/step-8.pt", code=2).err
    ckpt("import", "nothing", code=3)
    assert ckpt("log", "--json").json == []
    assert "import " in ckpt("--help").out
    made = ckpt("import", "run", "--pattern", "step-1?.pt", "--branch", "old", "--json").json
    assert [item["branch"] for item in made["checkpoints"]] == ["old"] * 3


def test_an_import_that_is_killed_goes_on(ckpt_process: Ckpt, ckpt: Ckpt, folder: Path) -> None:
    code = (
        f"import os\nos.chdir({str(folder.parent)!r})\nfrom ckptvcs.ops import import_folder\n"
        "commit, count = import_folder.commit_path, [0]\n"
        "def dies(*a, **k):\n"
        "    made = commit(*a, **k)\n    count[0] += 1\n"
        "    if count[0] == 3: os._exit(9)\n    return made\n"
        "import_folder.commit_path = dies\n"
        "from ckptvcs.cli.app import app\napp(['import', 'run', '--delete-originals'])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert killed.returncode == 9
    assert names(folder) == ["step-10.pt", "step-11.pt", "step-12.pt"]
    found = ckpt_process("import", "run", "--delete-originals", "--json").json
    actions = [item["action"] for item in found["checkpoints"]]
    assert actions == ["known"] + ["committed"] * 2
    log = ckpt("log", "--json").json
    assert [entry["exact_lasts"] for entry in log] == [True] * 5
    assert names(folder) == []


def test_the_table_fits_80_columns(ckpt: Ckpt, folder: Path) -> None:
    assert all(len(line) <= 80 for line in ckpt("import", "run").out.splitlines())


@pytest.mark.parametrize("at", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_an_interrupted_import_says_what_it_did(
    at: float, ckpt: Ckpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptvcs.cli import render

    total = sum(path.stat().st_size for path in folder.iterdir())
    seen = [0]

    def interrupt(count: int) -> None:
        seen[0] += count
        if seen[0] >= at * total:
            raise KeyboardInterrupt

    @contextmanager
    def progress(label: str, _: int | None) -> Iterator[Callable[[int], None]]:
        yield interrupt if label == "importing" else lambda _: None

    with monkeypatch.context() as patched:
        patched.setattr(render, "progress", progress)
        done = ckpt("import", "run", "--delete-originals", "--accept-near", code=130)
    commits, removed = len(ckpt("log", "--json").json), 5 - len(names(folder))
    said = done.err.splitlines()[-1]
    assert said.startswith("interrupted; ")
    assert (f"{commits} of 5 checkpoints were committed" in said) == (commits > 0)
    assert (" removed" in said) == (removed > 0)
    assert ckpt("verify", "--json").json["ok"]
    ckpt("import", "run", "--delete-originals", "--accept-near")
    assert names(folder) == []
    assert len(ckpt("log", "--json").json) == 5


def test_import_names_older_commits_that_become_near(ckpt: Ckpt, folder: Path) -> None:
    ckpt("commit", "run/step-8.pt")
    done = ckpt("import", "run", "--pattern", "step-1?.pt")
    assert "note: step 1 is near now (" in done.err
    assert done.err.count("is near now") == 1
    assert "is near now" not in ckpt("import", "run", "--pattern", "step-1?.pt").err
