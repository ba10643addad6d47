"""What the columns of `log` show, and which of them a narrow terminal leaves out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from ckptvcs import Repo
from ckptvcs.cli import entries, render
from tests.helpers.command_line import Ckpt
from tests.helpers.states import adam_state, moved, weights


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    repo, now = Repo.init(tmp_path), weights()
    for step in range(1, 5):
        metrics = {"loss": 1 / step, "eval_loss": 2 / step, "acc": step / 9, "lr": 1e-4}
        repo.commit(adam_state(now, step), step=step, message="a message", metrics=metrics)
        now = moved(now)
    return repo


def headings(ckpt: Ckpt) -> list[str]:
    line = ckpt("log").out.splitlines()[0]
    return line.replace("on disk", "on_disk").split()


def test_the_metrics_are_a_setting(ckpt: Ckpt, run: Repo) -> None:
    assert headings(ckpt)[4:6] == ["loss", "eval_loss"]
    ckpt("config", "log-columns", "lr, acc")
    assert headings(ckpt)[4:6] == ["lr", "acc"]
    ckpt("config", "log-columns", "--unset")
    ckpt("config", "keep-best", "acc:max")
    assert headings(ckpt)[4:7] == ["acc", "loss", "eval_loss"]
    assert ckpt("config", "log-columns", " , ", code=2).err.startswith("error: 'log-columns'")


def test_other_metrics_have_columns_if_there_are_no_usual_ones() -> None:
    entry = mock.Mock(metrics={"f1": 0.5, "bleu": 30.0, "rouge": 1.0})
    assert entries.shown_metrics("auto", "", [entry]) == ["f1", "bleu"]
    assert entries.shown_metrics("auto", "", []) == []


def test_sizes_now_and_later(ckpt: Ckpt, run: Repo) -> None:
    run.tag("v1", 4)
    rows = [line.split("  ") for line in ckpt("log").out.splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    listed = run.log()
    for row, entry in zip(cells, listed, strict=True):
        now = entry.stored_bytes + entry.exact_bytes
        later = now if entry.exact_lasts else entry.stored_bytes
        assert row[-4:-2] == [render.size(now), render.size(later)]
    assert [row[-1] for row in cells[:2]] == ["exact", "exact for now"]
    assert all(row[-1].startswith("near ") for row in cells[2:])
    assert "(HEAD -> main, tag: v1) a message" in cells[0]


@pytest.mark.parametrize(
    ("past", "shown"),
    [
        (timedelta(seconds=5), "5 s ago"),
        (timedelta(minutes=3), "3 min ago"),
        (timedelta(hours=7), "7 h ago"),
        (timedelta(days=6), "6 d ago"),
    ],
)
def test_times_are_relative(past: timedelta, shown: str) -> None:
    assert entries.when((datetime.now(UTC) - past).isoformat()) == shown


def test_old_and_future_times_are_dates() -> None:
    assert entries.when("2020-03-04T12:00:00+00:00") == "2020-03-04"
    assert entries.when("2999-03-04T12:00:00+00:00") == "2999-03-04"


@pytest.mark.parametrize(
    ("columns", "gone"), [(200, set()), (98, {"ratio", "when"}), (82, {"ratio", "when", "later"})]
)
def test_a_narrow_terminal_leaves_out_the_least_important_columns(
    columns: int,
    gone: set[str],
    run: Repo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(render, "is_terminal", lambda: True)
    rows = entries.log_rows([("", entry) for entry in run.log()], run.labels(), ["loss"])
    render.table(rows, ("ratio", "when", "later"))
    lines = capsys.readouterr().out.splitlines()
    shown = set(lines[0].replace("on disk", "on_disk").split())
    assert {"ratio", "when", "later"} - shown == gone
    assert {"step", "id", "message", "loss", "on_disk", "fidelity"} <= shown
    assert max(map(len, lines)) <= columns
    assert "exact for now" in lines[1]
