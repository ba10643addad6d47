"""each: every commit is run once, from the file that a checkout writes, and its metrics stay."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from ckptvcs import InvalidInputError, LogEntry, NotFoundError, Policy, Repo, StorageError, Visit
from ckptvcs.ops.command import printed_metrics
from ckptvcs.ops.history_reader import handle
from tests.helpers.checkpoints import trainer_directory
from tests.helpers.training import save_run, train


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight commits of model.pt, most of them near."""
    folder = tmp_path_factory.mktemp("each")
    repo = Repo.init(folder)
    repo.configure("max-weight-error", "off")
    for path in save_run(folder / "run", train(8)):
        shutil.copy(path, folder / "model.pt")
        repo.commit_path(folder / "model.pt", message="x")
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    shutil.copytree(template, tmp_path / "repo")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return Repo.open(tmp_path / "repo")


def left_behind(run: Repo) -> list[Path]:
    return [*(run.root.parent / "scratch").glob("ckpt-each-*")]


def states(visits: list[Visit]) -> list[tuple[int | None, str]]:
    return [(visit.entry.step, visit.state) for visit in visits]


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_commit_is_run_on_the_file_that_a_checkout_writes(run: Repo, jobs: int) -> None:
    seen: dict[int | None, bytes] = {}

    def read(entry: LogEntry, path: Path) -> dict[str, float]:
        assert len(left_behind(run)) <= jobs
        assert path.name == "model.pt"
        seen[entry.step] = path.read_bytes()
        return {"bytes": len(seen[entry.step])}

    visits = run.each(read, 2, 7, jobs=jobs)
    assert states(visits) == [(step, "done") for step in range(2, 8)]
    assert set(seen) == {2, 3, 4, 5, 6, 7}
    for step, data in seen.items():
        run.checkout_files(step or 0, run.root / "out.pt", force=True)
        assert (run.root / "out.pt").read_bytes() == data
        assert run.show(step or 0).metrics == {"bytes": len(data)}
    assert run.show(1).metrics == {}
    assert not left_behind(run)


def test_directories_parts_and_formats(repo: Repo, tmp_path: Path) -> None:
    for step, state in enumerate(train(3), start=1):
        repo.commit_path(trainer_directory(tmp_path, state, step), message="x")
    names: list[list[str]] = []

    def look(_: LogEntry, path: Path) -> None:
        files = path.rglob("*") if path.is_dir() else [path]
        names.append(sorted(file.name for file in files))

    repo.each(look)
    assert names == [
        sorted(file.name for file in (tmp_path / f"checkpoint-{step}").rglob("*"))
        for step in (1, 2, 3)
    ]
    names.clear()
    repo.each(look, 1, 1, only="model")
    repo.each(look, 1, 1, form="safetensors")
    assert names == [["checkpoint-1.model.pt"], ["checkpoint-1.safetensors"]]
    for wrong in ({"only": "all"}, {"form": "zip"}, {"jobs": 0}):
        with pytest.raises(InvalidInputError):
            repo.each(look, **wrong)
    with pytest.raises(InvalidInputError, match="either"):
        repo.each()
    with pytest.raises(NotFoundError, match="range"):
        repo.each(look, 100, 200)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_stops_no_other_commit_and_is_tried_again(run: Repo, jobs: int) -> None:
    bad = {3, 5}

    def fail(entry: LogEntry, _: Path) -> dict[str, float]:
        if entry.step in bad:
            raise ValueError("cannot evaluate")
        return {"eval": 1.0, "other": 2.0}

    visits = run.each(fail, jobs=jobs, metrics=["eval", "other"])
    assert [step for step, state in states(visits) if state == "failed"] == [3, 5]
    assert isinstance(visits[2].error, ValueError)
    bad.remove(3)
    visits = run.each(fail, jobs=jobs, metrics=["eval", "other"])
    assert [pair for pair in states(visits) if pair[1] != "skipped"] == [(3, "done"), (5, "failed")]
    assert all(run.show(step).metrics["eval"] == 1.0 for step in (1, 2, 3, 4, 6, 7, 8))
    assert not left_behind(run)


def test_a_commit_that_got_the_metric_meanwhile_is_skipped(run: Repo) -> None:
    def evaluate(entry: LogEntry, _: Path) -> dict[str, float]:
        Repo.open(run.root).note((entry.step or 0) + 1, metrics={"eval": 9.0})
        return {"eval": 1.0}

    visits = run.each(evaluate, 1, 6, metrics=["eval"])
    assert [state for _, state in states(visits)] == ["done", "skipped"] * 3
    assert [run.show(step).metrics["eval"] for step in (1, 2)] == [1.0, 9.0]


def test_a_temporary_directory_that_cannot_be_used(
    run: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(run.root / "missing"))
    with pytest.raises(StorageError, match="temporary directory") as caught:
        run.each(lambda *_: {"eval": 1.0})
    assert "TMPDIR" in (caught.value.hint or "")


def test_fail_fast_begins_no_further_commit(run: Repo) -> None:
    begun: list[int | None] = []

    def fail(entry: LogEntry, _: Path) -> None:
        begun.append(entry.step)
        if entry.step == 3:
            raise ValueError

    visits = run.each(fail, fail_fast=True)
    assert begun == [1, 2, 3]
    assert states(visits) == [(1, "done"), (2, "done"), (3, "failed")]


def test_a_result_without_the_metric_is_a_failure(run: Repo) -> None:
    results: dict[int | None, object] = {1: None, 2: {"eval": "x"}, 3: {"other": 1.0}}
    visits = run.each(lambda entry, _: results[entry.step], 1, 3, metrics=["eval"])  # type: ignore[arg-type,return-value]
    assert [state for _, state in states(visits)] == ["failed"] * 3
    assert run.show(3).metrics == {"other": 1.0}


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interruption_keeps_what_is_done(run: Repo, jobs: int) -> None:
    ended = threading.Event()

    def interrupt(entry: LogEntry, _: Path) -> dict[str, float]:
        if entry.step == 4:
            ended.wait(5)
            raise KeyboardInterrupt
        if entry.step == 3:
            ended.set()
        return {"eval": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run.each(interrupt, jobs=jobs, metrics=["eval"])
    assert not left_behind(run)
    visits = run.each(lambda *_: {"eval": 2.0}, metrics=["eval"])
    assert states(visits)[:3] == [(1, "skipped"), (2, "skipped"), (3, "skipped")]
    assert {state for _, state in states(visits)[3:]} <= {"done", "skipped"}
    assert run.show(4).metrics["eval"] == 2.0


def test_a_commit_that_cannot_be_decoded_is_a_failure_of_its_own(run: Repo) -> None:
    run.gc(Policy(optimizer_last=3))
    visits = run.each(lambda *_: {"eval": 1.0})
    assert [step for step, state in states(visits) if state == "failed"] == [1, 2, 3, 4, 5]
    visits = run.each(lambda *_: {"eval": 1.0}, only="model")
    assert {state for _, state in states(visits)} == {"done"}


def test_damage_of_one_commit_leaves_the_others(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path, codec="lossless")
    for step in range(1, 5):  # shapes differ, so that no commit depends on another
        repo.commit({"model": {"w": torch.full((900 + step,), float(step))}}, step=step)
    catalog = handle(repo).catalog
    table = catalog.commit(repo.resolve(2)).parts["model"].values
    (place,) = catalog.store.places(catalog.recipe(table).bundles[0])
    (repo.folder / place.folder / place.pack[:2] / f"{place.pack}.pack").unlink()
    visits = Repo.open(tmp_path).each(lambda *_: {"eval": 1.0})
    assert states(visits) == [(1, "done"), (2, "failed"), (3, "done"), (4, "done")]


# -- commands ----------------------------------------------------------------------------------


def command(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys\n{code}"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_command_gets_the_path_and_prints_metrics(run: Repo, jobs: int) -> None:
    code = "print('talk'); print(json.dumps({'step': int(sys.argv[2]), 'name': 'x', 'ok': True}))"
    code += "; print(os.path.getsize(sys.argv[1]), os.environ['CKPT_STEP'] == sys.argv[2])"
    visits = run.each(command=[*command(code), "{}", "{step}", "{id}"], jobs=jobs)
    assert states(visits) == [(step, "done") for step in range(1, 9)]
    assert [visit.metrics for visit in visits] == [{"step": step} for step in range(1, 9)]
    assert run.show(8).metrics == {"step": 8.0}


def test_a_command_without_placeholder_gets_the_path_last(run: Repo) -> None:
    code = "print(json.dumps({'size': os.path.getsize(sys.argv[1]), 'args': len(sys.argv)}))"
    (visit,) = run.each(None, 8, 8, command=command(code))
    assert visit.metrics["args"] == 2
    assert visit.metrics["size"] > 1000


def test_no_shell_reads_the_command(run: Repo, tmp_path: Path) -> None:
    run.each(None, 8, 8, command=[*command("print('{}')"), "; touch pwned", "$(touch pwned)"])
    assert not (tmp_path / "pwned").exists()
    assert not Path("pwned").exists()


def test_a_command_that_fails_or_does_not_exist(run: Repo) -> None:
    visits = run.each(None, 7, 8, command=command("sys.exit(int(os.environ['CKPT_STEP']))"))
    assert [str(visit.error) for visit in visits] == [
        "the command ended with exit code 7",
        "the command ended with exit code 8",
    ]
    (visit,) = run.each(None, 8, 8, command=command("os.kill(os.getpid(), 9)"))
    assert str(visit.error) == "the command was ended by signal 9"
    with pytest.raises(InvalidInputError, match="no such program"):
        run.each(command=["no-such-program-at-all"])
    (visit,) = run.each(None, 8, 8, command=["{}"])
    assert "cannot run" in str(visit.error)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (b"", {}),
        (b'{"a": 1}', {"a": 1.0}),
        (b'x\n{"a": 1}\n{"a": 2, "b": "x", "c": true, "d": null}\ndone\n', {"a": 2.0}),
        (b'{"a": 1}\n{}\n{"b": "x"}\n', {"a": 1.0}),
        (b'{"a": 1}\r\n', {"a": 1.0}),
        (b'{"a": NaN, "b": -Infinity}', {"b": float("-inf")}),
        (b'[1]\n{"a": {"b": 1}}\n{broken\n\xff{"a": 1}', {}),
        (b'{"a": %s, "b": 1e999}' % (b"9" * 400), {"b": float("inf")}),
        (b'{"a":' * 100_000, {}),
        (b'{"": 1}', {}),
    ],
)
def test_the_last_line_of_json_with_numbers_counts(output: bytes, found: dict[str, float]) -> None:
    metrics = printed_metrics(output)
    assert {name: value for name, value in metrics.items() if value == value} == found
    assert json.dumps(metrics)


def test_a_tag_that_is_named_like_an_id_gets_no_metrics(run: Repo) -> None:
    name = run.resolve(2)
    run.tag(name, 3)
    (visit,) = run.each(lambda *_: {"eval": 1.0}, 2, 2)
    assert visit.entry.id == name
    assert run.entry(name).metrics == {"eval": 1.0}
    assert run.show(3).metrics == {}
