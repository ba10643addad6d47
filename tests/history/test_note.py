"""Notes are merged by key, and foreign bytes are read or refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given

from ckptvcs.errors import CorruptionError
from ckptvcs.history.canonical_json import dump
from ckptvcs.history.note import MAX_BYTES, Note, dump_note, in_order, load_note, merge
from ckptvcs.store.ids import ObjectId
from tests.helpers.fuzzing import mutated_json, read_or_refuse

A = ObjectId("a" * 64)
TIMES = ["2026-01-01T00:00:00.000000Z", "2026-01-02T00:00:00.000000Z"]
NOTE = Note(
    A, 3, TIMES[0], "me", "text", {"loss": 0.5, "acc": None, "bad": float("inf")}, {"k": "v"}
)


def test_what_is_written_is_read() -> None:
    assert load_note(dump_note(NOTE)) == NOTE
    empty = Note(A, 1, TIMES[0], "")
    assert load_note(dump_note(empty)) == empty


def test_the_highest_generation_then_time_then_id_counts_for_each_key() -> None:
    notes = [
        (ObjectId("1" * 64), Note(A, 1, TIMES[1], "", "first", {"a": 1.0, "b": 1.0, "c": 1.0})),
        (ObjectId("4" * 64), Note(A, 2, TIMES[0], "", None, {"a": 2.0}, {"k": "early"})),
        (ObjectId("2" * 64), Note(A, 2, TIMES[1], "", None, {"b": 3.0}, {"k": "low id"})),
        (ObjectId("3" * 64), Note(A, 2, TIMES[1], "", None, {"c": None}, {"k": "high id"})),
    ]
    for shuffled in itertools.permutations(notes):
        ordered = (note for _, note in in_order(shuffled))
        merged = merge("message", {"b": 0.0, "d": 4.0}, ordered)
        assert merged.message == "first"
        assert merged.metrics == {"a": 2.0, "b": 3.0, "d": 4.0}
        assert merged.fields == {"k": "high id"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"commit": "a"},
        {"commit": None},
        {"generation": 0},
        {"generation": -1},
        {"generation": True},
        {"generation": 1 << 70},
        {"time": "yesterday"},
        {"time": "2026-01-01T00:00:00"},
        {"user": 1},
        {"message": 1},
        {"message": "x" * MAX_BYTES},
        {"metrics": []},
        {"metrics": {"a": "1"}},
        {"metrics": {"a": True}},
        {"metrics": {"a": 1 << 70}},
        {"fields": {"a": 1}},
        {"fields": {"a": ["x"]}},
    ],
    ids=repr,
)
def test_a_note_that_is_not_valid_is_damage(wrong: dict[str, Any]) -> None:
    fields = {"commit": A, "generation": 1, "time": TIMES[0], "user": ""}
    assert load_note(dump(fields)).commit == A
    with pytest.raises(CorruptionError):
        load_note(dump(fields | wrong))


@given(mutated_json(json.loads(dump_note(NOTE))))
def test_foreign_notes_are_read_or_refused(value: Any) -> None:
    read_or_refuse(lambda: load_note(dump(value)))
