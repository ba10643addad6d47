"""Objects of the history, refs and settings that somebody else made: read, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.codec.spec import parse_codec
from ckptvcs.decode.commit_reader import safe_path
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.canonical_json import dump
from ckptvcs.history.commit import (
    Commit,
    ErrorReport,
    FileEntry,
    PartState,
    dump_commit,
    dump_errors,
    find_metrics,
    first_parent,
    load_commit,
    load_errors,
)
from ckptvcs.history.format_file import check_format, require_flags
from ckptvcs.history.provenance import CodeState, Provenance, dump_provenance, load_provenance
from ckptvcs.history.recipe import (
    Frame,
    Recipe,
    dump_bundle,
    dump_recipe,
    load_bundle,
    load_recipe,
    load_values,
)
from ckptvcs.history.records import Archived, DropRecord, dump_drop_record, load_drop_record
from ckptvcs.history.refs import HEAD, Refs
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
from ckptvcs.ops.config import KEYS, load_config
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import dead_leases, live_leases
from ckptvcs.store.local import LocalBackend
from tests.helpers.fuzzing import any_json, little_room, mutated, mutated_json, read_or_refuse
from tests.helpers.memory_backend import MemoryBackend

A, B = ObjectId("a" * 64), ObjectId("b" * 64)

COMMIT = Commit(
    (B,),
    "2026-01-01T00:00:00Z",
    7,
    "message",
    {"loss": 0.5, "worse": float("inf")},
    "near",
    "delta",
    3,
    1000,
    100,
    50,
    "file",
    "model.pt",
    True,
    A,
    {"model": PartState(A, B)},
    (FileEntry("model.pt", 1000, A, 0o644, 1, "torch-zip", B),),
    ErrorReport(0.1),
    A,
    "host",
    "user",
    None,
    1,
    A,
)
PROVENANCE = Provenance(
    "/run",
    "3.11",
    "Linux",
    {"torch": "2"},
    ("GPU",),
    {"wandb": "1"},
    ("train.py", "--rate"),
    CodeState("ab" * 20, "main", True, ("a.py",), ("b/",), "diff", complete=False),
)
FRAMES = [
    Frame(None, 0, None, ((0, 10, b"x" * 16), (10, 5, b"y" * 16))),
    Frame((A, 4), 2, None, ((15, 1, b"z" * 16),)),
    Frame((B, 4), 9, 0, ((90, 3, b"w" * 16), (16, 2, b"v" * 16))),
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
SEGMENTS = [(Op.LITERAL, 3), (Op.TENSOR, 0), (Op.CRC32, 0), (Op.INLINE, 1), (Op.LITERAL, 1)]
LITERALS = b"abc12345678z"


def views_fit(data: bytes) -> None:
    """Reading what a schema says of memory that is not there is never possible."""
    for info in load_schema(data).tensors:
        for view in info.views:
            assert view.fits(info.size_bytes)


ARCHIVE = DropRecord(
    "archive",
    (A,),
    (),
    "archive-after 2",
    "now",
    archived=(Archived(A, {"model": B}, ErrorReport(0.1, lag=2.5), 7, (A, B)),),
)

OBJECTS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "recipe": (load_recipe, dump_recipe(Recipe(A, 3, (A, B), (0, 1, 0), (5, 6, 7)))),
    "interpolated": (
        load_recipe,
        dump_recipe(Recipe(A, 3, (A,), (0, 1, 1), (5, 1, 2), ends=(A, B), share=(1, 4))),
    ),
    "archive": (load_drop_record, dump_drop_record(ARCHIVE)),
    "bundle": (load_bundle, dump_bundle(FRAMES)),
    "schema": (views_fit, dump_schema(SCHEMA)),
    "let go": (
        load_drop_record,
        dump_drop_record(DropRecord("fade", (A,), ("model",), "keep-exact", "now")),
    ),
    "commit": (lambda data: load_commit(A, data), dump_commit(COMMIT)),
    "first parent": (first_parent, dump_commit(COMMIT)),
    "metrics": (find_metrics, dump_commit(COMMIT)),
    "errors": (load_errors, dump_errors({0: ErrorReport(0.1, 0.2), 2: ErrorReport()})),
    "provenance": (load_provenance, dump_provenance(PROVENANCE)),
    "values": (load_values, b"x" * 64),
    "skeleton": (
        lambda data: list(load_skeleton(data).walk(SCHEMA)),
        dump_skeleton(SEGMENTS, LITERALS),
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
@given(data=st.data())
def test_mutated_objects_are_read_or_refused(name: str, data: st.DataObject) -> None:
    load, good = OBJECTS[name]
    load(good)
    changed = data.draw(mutated(good))
    read_or_refuse(lambda: load(changed))


@pytest.mark.parametrize("name", [n for n, (_, good) in OBJECTS.items() if good[:1] == b"{"])
@given(data=st.data())
def test_objects_with_any_field_are_read_or_refused(name: str, data: st.DataObject) -> None:
    load, good = OBJECTS[name]
    changed = json.dumps(data.draw(mutated_json(json.loads(good)))).encode()
    read_or_refuse(lambda: load(changed))


@pytest.mark.parametrize("name", [n for n, (_, good) in OBJECTS.items() if good[:1] == b"{"])
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"metrics":{"a":[', b',"metrics":['])
def test_endless_nesting(name: str, opening: bytes) -> None:
    with little_room(), pytest.raises(CorruptionError):
        OBJECTS[name][0](opening * 100_000)


@given(
    st.lists(st.tuples(st.sampled_from(list(Op)), st.integers(0, 1 << 62)), max_size=5),
    st.binary(max_size=20),
)
def test_any_segments_are_read_or_refused(segments: list[tuple[Op, int]], literals: bytes) -> None:
    data = dump_skeleton(segments, literals)
    read_or_refuse(lambda: list(load_skeleton(data).walk(SCHEMA)))


def test_two_parents_in_one_commit() -> None:
    """What is walked quickly and what is read must be one history."""
    honest = json.loads(dump_commit(COMMIT))
    hidden = b'{"!":{"!":1,"parents":["' + A.encode() + b'"]},' + dump(honest)[1:]
    with pytest.raises(CorruptionError):
        load_commit(A, hidden)
    with pytest.raises(CorruptionError):
        load_commit(A, dump(honest | {"parents": [A, B]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"files": []},
        {"files": [json.loads(dump_commit(COMMIT))["files"][0]] * 2},
        {"files": [{"path": "a", "size": 0, "mode": 0, "mtime_ns": 0, "format": "link"}]},
        {"source": "thought"},
        {"time": "yesterday"},
        {"time": "2026-01-01"},
        {"time": ""},
        {"metrics": {"a": 10**400}},
        {"step": 1 << 63},
        {"depth": -1},
    ],
)
def test_commits_that_make_no_sense(fields: dict[str, Any]) -> None:
    load_commit(A, dump_commit(COMMIT))
    with pytest.raises(CorruptionError):
        load_commit(A, dump(json.loads(dump_commit(COMMIT)) | fields))


@pytest.mark.parametrize(
    "view",
    [
        View("v", "F32", 0, (13,), (1,)),
        View("v", "F32", 12, (1,), (1,)),
        View("v", "F64", 0, (12,), (1,)),
        View("v", "F32", 0, (2, 2), (12, 0)),
        View("v", "F32", 0, (1 << 50,), (0,)),
        View("v", "F32", 1 << 60, (0,), (1,)),
        View("v", "F32", 0, (2,), (1 << 62,)),
        View("v", "F32", 0, (2, 2), (1,)),
        View("v", "F32", 0, (1,) * 65, (1,) * 65),
        View("v", "X", 0, (1,), (1,)),
    ],
)
def test_views_that_leave_their_tensor(view: View) -> None:
    schema = Schema((TensorInfo("w", "F32", (3, 4), "model", "weight", views=(view,)),))
    with pytest.raises(CorruptionError):
        load_schema(dump_schema(schema))


@given(
    st.text(max_size=12)
    | st.lists(
        st.sampled_from(
            ["..", ".", "", "a", ".ckpt", ".CKPT", "\0", "\ud800", "\udcff", "x" * 300, "C:", "nul"]
        ),
        max_size=4,
    ).map("/".join)
)
def test_paths_stay_inside(path: str) -> None:
    try:
        safe = Path("/target") / safe_path(path)
    except CkptError:
        return
    assert safe.is_relative_to("/target")
    assert safe != Path("/target")
    assert not {"..", ".ckpt"} & {part.lower() for part in safe.parts}
    assert "\0" not in path


# -- refs, leases, marks ---------------------------------------------------------------------------


def published() -> MemoryBackend:
    backend = MemoryBackend()
    refs = Refs(backend)
    state = refs.publish("heads/main", None, commit=A, time="t", action="commit")
    refs.publish("heads/main", state, commit=B, time="t", action="commit")
    refs.publish(HEAD, None, commit=None, branch="main", time="t", action="init")
    refs.publish("tags/v1.0", None, commit=A, time="t", action="tag")
    return backend


def read_refs(backend: MemoryBackend) -> None:
    refs = Refs(backend)
    refs.read(HEAD)
    for space in ("heads", "tags", "pins"):
        refs.targets(space)
        for name in refs.names(space):
            refs.reflog(f"{space}/{name}")
            refs.check(f"{space}/{name}")
            state = refs.read(f"{space}/{name}")
            refs.publish(f"{space}/{name}", state, commit=None, time="t", action="x")


FILES = sorted(published().files)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_mutated_refs_are_read_or_refused(name: str, data: st.DataObject) -> None:
    backend = published()
    good = backend.files[name]
    if data.draw(st.booleans()):
        backend.files[name] = data.draw(mutated(good))
    else:
        backend.files[name] = json.dumps(data.draw(mutated_json(json.loads(good)))).encode()
    read_or_refuse(lambda: read_refs(backend))


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("refs/")])
def test_refs_with_numbers_that_are_not_finite(name: str, number: bytes) -> None:
    backend = published()
    backend.files[name] = re.sub(rb'(?<="generation":)\d+', number, backend.files[name])
    with pytest.raises(CorruptionError):
        read_refs(backend)


@given(
    st.lists(
        st.sampled_from(
            [
                "..",
                ".",
                "%2E%2E",
                "%2e",
                "%2F",
                "main",
                "Main",
                "%FF",
                "%",
                "",
                "%00",
                "\ud800",
                "x" * 300,
                "0000000000000001",
                "9999999999999999",
                "0000000000000000",
                "\u0661" * 16,
            ]
        ),
        min_size=1,
        max_size=3,
    ).map("/".join)
)
def test_names_of_refs(below: str) -> None:
    backend = published()
    for space in ("heads", "tags", "pins"):
        backend.files[f"refs/{space}/{below}/0000000000000001"] = b"{}"
        backend.files[f"refs/{space}/{below}"] = backend.files[FILES[0]]
    before = {name for name in backend.files if "refs/" not in name}
    read_or_refuse(lambda: read_refs(backend))
    assert {name for name in backend.files if "refs/" not in name} == before
    spares = {name for name in backend.files if name.startswith("cache/")}
    assert all(name in FILES or name.count("/") == 3 for name in spares)
    refs = Refs(backend)
    for name in ("..", ".", "", below):
        read_or_refuse(lambda name=name: refs.read(f"heads/{name}"))  # type: ignore[misc]


@given(
    mutated(b'{"host":"here","boot":"x","pid":123,"started":"77"}')
    | any_json.map(lambda value: json.dumps(value).encode())
    | st.just(b"[" * 4000)
)
def test_any_lease_is_read_or_refused(data: bytes) -> None:
    backend = MemoryBackend()
    backend.files |= {"leases/one": data, "marks/exclusive": data}
    read_or_refuse(lambda: live_leases(backend) + dead_leases(backend))


# -- format and settings ---------------------------------------------------------------------------

FORMAT = {"format": 1, "id": "ab", "flags": {"read": ["near"], "write": [], "gc": []}}
VALUES = ['"near"', 2, '"loss:min"', '"exact"', '"near"', '"exact"', 0.1, 1.5, '"off"', 64, 16.5]
VALUES += ['"loss"', 16, 4, '"auto"', '"7d"', '"full"', '"on"']
CONFIG = "\n".join(f"{key} = {value}" for key, value in zip(KEYS, VALUES, strict=True))


def read_format(folder: Path, data: bytes) -> None:
    (folder / "format").write_bytes(data)
    backend = LocalBackend(folder)
    check_format(backend)
    require_flags(backend, "write")
    require_flags(backend, "gc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@given(
    mutated(json.dumps(FORMAT).encode())
    | mutated_json(FORMAT).map(lambda value: json.dumps(value).encode())
)
def test_any_format_file_is_read_or_refused(folder: Path, data: bytes) -> None:
    read_or_refuse(lambda: read_format(folder, data))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 60_000,
        b'{"format":1,"flags":{"read":[[]]}}',
        b'{"format":1,"flags":{"read":[{}]}}',
        b'{"format":0}',
        b'{"format":-1}',
        b'{"format":1' + b" " * 100_000 + b"}",
        b"\xff\xfe",
    ],
)
def test_formats_that_make_no_sense(folder: Path, data: bytes) -> None:
    with pytest.raises(CorruptionError):
        read_format(folder, data)


def test_a_format_and_settings_of_a_gigabyte(folder: Path) -> None:
    for name, read in (
        ("format", lambda path: check_format(LocalBackend(path.parent))),
        ("config.toml", load_config),
    ):
        path = folder / name
        with path.open("wb") as file:
            file.truncate(1 << 30)
        with little_room(), pytest.raises(CkptError):
            read(path)
        path.unlink()


TOML = st.sampled_from(
    [
        "nan",
        "-inf",
        "1e400",
        "-1",
        "0",
        "0x" + "f" * 6000,
        "9" * 5000,
        "true",
        '"nan"',
        '"1e999"',
        '"near:step=1e-400"',
        '"near:step=nan"',
        '"a:b:c:d"',
        "[" * 5000,
        "{a.b.c=1}",
        "1979-05-27",
        '"\\ud800"',
        '"\\u0000"',
        "''",
    ]
)


@given(
    mutated(CONFIG.encode())
    | st.builds(lambda key, value: f"{key} = {value}".encode(), st.sampled_from(KEYS), TOML)
)
def test_any_settings_are_read_or_refused(folder: Path, data: bytes) -> None:
    path = folder / "config.toml"
    path.write_bytes(data)

    def read() -> None:
        config = load_config(path)
        assert config.exact_rule is not None
        config.codec_of(None)

    read_or_refuse(read)


@given(mutated(b"near:step=1.5,gamma=0.5,zone=0.5").map(lambda data: data.decode("latin1")))
def test_any_codec_name_is_parsed_or_refused(text: str) -> None:
    read_or_refuse(lambda: parse_codec(text))
