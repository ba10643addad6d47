"""Every object of history may come from somebody else: it is read, or refused as damage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ckptvcs.decode.commit_reader import safe_path
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.commit import ErrorReport
from ckptvcs.history.recipe import Frame, Recipe, dump_bundle, dump_recipe, load_bundle, load_recipe
from ckptvcs.history.records import Archived, DropRecord, dump_drop_record, load_drop_record
from ckptvcs.history.schema import (
    Op,
    Schema,
    TensorInfo,
    View,
    dump_schema,
    dump_skeleton,
    load_schema,
    load_skeleton,
)
from ckptvcs.store.ids import ObjectId

A, B = ObjectId("a" * 64), ObjectId("b" * 64)

RECIPE = Recipe(A, 3, (A, B), (0, 1, 0), (5, 6, 7))
FRAMES = [
    Frame(None, 0, None, ((0, 10, b"x" * 16), (10, 5, b"y" * 16))),
    Frame((A, 4), 2, None, ((15, 1, b"z" * 16),)),
    Frame((B, 4), 9, 0, ((90, 3, b"w" * 16), (16, 2, b"v" * 16))),
    Frame(None, 0, None, ()),
]
SCHEMA = Schema(
    (
        TensorInfo("w", "F32", (3, 4), "model", "weight"),
        TensorInfo("s", "I64", (), "optimizer", "step", inline=True),
        TensorInfo(
            "m",
            "F32",
            (3, 4),
            "optimizer",
            "exp_avg",
            pair=0,
            views=(View("m", "F32", 2, (2,), (3,)),),
        ),
    )
)
LET_GO = DropRecord("fade", (A,), ("model",), "keep-exact", "now")
SEGMENTS = [(Op.LITERAL, 3), (Op.TENSOR, 0), (Op.CRC32, 0), (Op.INLINE, 1), (Op.LITERAL, 1)]


def test_what_is_written_is_read() -> None:
    assert load_recipe(dump_recipe(RECIPE)) == RECIPE
    assert load_bundle(dump_bundle(FRAMES)) == tuple(FRAMES)
    assert load_schema(dump_schema(SCHEMA)) == SCHEMA
    assert load_drop_record(dump_drop_record(LET_GO)) == LET_GO
    skeleton = load_skeleton(dump_skeleton(SEGMENTS, b"abc12345678z"))
    walked = [(op, bytes(data)) for op, _, data in skeleton.walk(SCHEMA)]
    assert walked == [
        (Op.LITERAL, b"abc"),
        (Op.TENSOR, b""),
        (Op.CRC32, b""),
        (Op.INLINE, b"12345678"),
        (Op.LITERAL, b"z"),
    ]


@pytest.mark.parametrize("literals", [b"", b"abc1234567", b"abc12345678zz"])
def test_literals_must_add_up(literals: bytes) -> None:
    skeleton = load_skeleton(dump_skeleton(SEGMENTS, literals))
    with pytest.raises(CorruptionError):
        list(skeleton.walk(SCHEMA))
    with pytest.raises(CorruptionError):
        list(load_skeleton(dump_skeleton([(Op.TENSOR, 3)], b"")).walk(SCHEMA))


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "./a", "a//b", "a\0b", "a" * 5000],
)
def test_paths_that_leave_their_target(path: str) -> None:
    with pytest.raises(CkptError):
        safe_path(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"ends": (A,)},
        {"ends": (A, A, A)},
        {"ends": ()},
        {"share": (0, 4)},
        {"share": (4, 4)},
        {"share": (5, 4)},
        {"share": (1,)},
        {"share": (1, 1 << 24)},
        {"patch": True},
        {"owners": (2,)},
    ],
)
def test_an_interpolation_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    good = Recipe(A, 0, (A,), (1,), (0,), ends=(A, A), share=(1, 4))
    assert load_recipe(dump_recipe(good)) == good
    with pytest.raises(CorruptionError):
        load_recipe(dump_recipe(replace(good, **fields)))


def test_an_archive_lists_its_commits_once_and_in_order() -> None:
    row = Archived(A, {"model": A}, ErrorReport())
    good = DropRecord("archive", (A,), (), "rule", "now", archived=(row,))
    assert load_drop_record(dump_drop_record(good)) == good
    for bad in (
        replace(good, archived=()),
        replace(good, archived=(row, row)),
        replace(good, what="drop"),
        replace(good, commits=(ObjectId("b" * 64),)),
        replace(good, archived=(replace(row, parts={}),)),
        replace(good, archived=(replace(row, parts={"other": A}),)),
    ):
        with pytest.raises(CorruptionError):
            load_drop_record(dump_drop_record(bad))
