"""ls, du, series, status and log: their JSON, and what they refuse."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.helpers.command_line import Ckpt


def test_ls_and_du_as_json(ckpt: Ckpt, history: Path) -> None:
    rows = ckpt("ls", 3, "model*weight", "--json").json
    assert [row["name"] for row in rows] == [f"model.{n}.weight" for n in (0, 2, 3, 4)]
    keys = {"name", "aliases", "part", "role", "dtype", "shape", "bytes", "form", "error"}
    keys.add("exact_lasts")
    assert all(row.keys() == keys for row in rows)
    assert {(row["form"], row["error"]) for row in rows} == {("exact", 0)}
    stats, usage = ckpt("stats", "--json").json, ckpt("du", "--json", "--by", "tensor").json
    assert usage.keys() == {"by", "bytes", "rows"}
    assert usage["bytes"] == stats["stored_bytes"] + stats["cache_bytes"]
    assert sum(row["bytes"] for row in usage["rows"]) == usage["bytes"]
    assert usage["rows"][0].keys() == {"name", "commit", "step", "bytes", "kinds"}
    assert [row["step"] for row in ckpt("du", 2, 4, "--by", "commit", "--json").json["rows"]] == [
        4,
        2,
    ]


def test_series_as_json_and_csv(ckpt: Ckpt, history: Path) -> None:
    asked = ("series", "model.*.bias", "2..4", "--stat", "max")
    rows = ckpt(*asked, "--json").json
    assert [row["step"] for row in rows] == [2, 3, 4]
    table = list(
        csv.reader(
            ckpt("series", "model.*.bias", "2..4", "--stat", "max", "--csv").out.splitlines()
        )
    )
    assert table[0] == ["step", "commit", *rows[0]["statistics"]]
    for line, row in zip(table[1:], rows, strict=True):
        assert line[:2] == [str(row["step"]), row["id"]]
        assert [*map(float, line[2:])] == [one["max"] for one in row["statistics"].values()]


def test_log_is_filtered(ckpt: Ckpt, history: Path) -> None:
    def steps(*args: object) -> list[int]:
        return [row["step"] for row in ckpt("log", *args, "--json").json]

    assert steps("2..4") == [4, 3, 2]
    assert steps("--steps", "..2", "--reverse") == [1, 2]
    assert steps("--metric", "loss<4", "--metric", "loss!=1", "--sort", "loss") == [3, 4]
    assert steps("--branch", "main", "--since", "1h", "-n", 1) == [5]
    assert steps("--until", "2020-01-01") == []


@pytest.mark.parametrize(
    "words",
    [
        ["log", "--graph", "--steps", "1..2"],
        ["log", "1..2", "--all"],
        ["log", "--steps", "one"],
        ["log", "--since", "later"],
        ["log", "--metric", "loss"],
        ["series", "model.0.weight", "--csv", "--json"],
        ["series", "model.0.weight", "1..2", "--stop", 2],
        ["diff", "1..2", "--near"],
        ["diff", "--near"],
        ["checkout", 1, "--near"],
        ["checkout", 1, "--near", "--only", "model"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_wrong_combinations_are_refused(ckpt: Ckpt, history: Path, words: list[object]) -> None:
    assert "error" in ckpt(*words, code=2).err
