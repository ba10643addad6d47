"""Checkpoint files and folders that somebody else made: their structure is read, or none is."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint import safetensors, torch_legacy, torch_zip
from ckptvcs.checkpoint.layout import Layout, covers
from ckptvcs.checkpoint.open import build, open_checkpoint
from ckptvcs.checkpoint.pickle_reader import read_pickle, walk
from ckptvcs.checkpoint.survey import survey
from ckptvcs.checkpoint.torch_writer import MemorySource
from ckptvcs.decode.commit_reader import safe_path
from ckptvcs.errors import CorruptionError, InvalidInputError
from ckptvcs.history.schema import dump_schema, load_schema
from ckptvcs.repo import Repo
from tests.helpers.fuzzing import little_room, mutated, mutated_json, read_or_refuse
from tests.helpers.training import train


def source(data: bytes) -> MemorySource:
    made = MemorySource()
    made.append(data)
    return made


def saved(**options: Any) -> bytes:
    """A small checkpoint of torch, with views, all in one file."""
    state = train(1)[0]
    small = state["model"]["0.weight"]
    out = io.BytesIO()
    torch.save(state | {"view": small[2:4], "row": small.view(-1)[3:9]}, out, **options)
    return out.getvalue()


ZIP, LEGACY = saved(), saved(_use_new_zipfile_serialization=False)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [8, 40], "data_offsets": [0, 1280]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [1280, 1282]},
}


def tensors_file(header: Any, payload: bytes = bytes(1282)) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + payload


def zip_edges(data: bytes) -> bytes:
    """The small parts of a zip file: what is changed there is not lost among numbers."""
    return data[: data.index(b"data/0")] + data[data.index(b"PK\x01\x02") :]


PARSERS: dict[str, tuple[Callable[[Any], Layout | None], bytes]] = {
    "zip": (torch_zip.parse, ZIP),
    "zip directory": (torch_zip.parse, zip_edges(ZIP)),
    "legacy": (torch_legacy.parse, LEGACY),
    "safetensors": (safetensors.parse, tensors_file(HEADER)),
}


def read(parse: Callable[[Any], Layout | None], data: bytes) -> None:
    """As far as a commit goes with it: a schema that can be read again."""
    file = source(data)
    layout = parse(file) if data else None
    if layout is None or not covers(layout, file.size):
        return
    made = build("file", [("a", file, layout)], [])
    at = 0
    for piece in made.files[0].pieces:
        assert piece.offset == at
        at += piece.size
    assert at == file.size
    load_schema(dump_schema(made.schema))


def test_they_are_read_when_they_are_good() -> None:
    for parse, good in PARSERS.values():
        layout = parse(source(good))
        assert good != zip_edges(ZIP) or layout is None or layout.tree is None
        assert good == zip_edges(ZIP) or (layout and layout.tensors)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(name: str, data: st.DataObject) -> None:
    parse, good = PARSERS[name]
    changed = data.draw(mutated(good))
    read_or_refuse(lambda: read(parse, changed))


@given(mutated_json(HEADER))
def test_headers_of_safetensors(header: Any) -> None:
    read_or_refuse(lambda: read(safetensors.parse, tensors_file(header)))


@pytest.mark.parametrize("shape", [[10**4000] * 300, [1] * 100_000, [1 << 55] * 60, [0, 1 << 60]])
def test_shapes_of_endless_products(shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    with little_room():
        read(safetensors.parse, tensors_file({"a": entry}, b""))
        read(safetensors.parse, (1 << 20).to_bytes(8, "little") + b"{" + b"[" * (1 << 20))


# -- pickles ---------------------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@given(st.data())
def test_mutated_pickles_are_read_or_refused(data: st.DataObject) -> None:
    protocol = data.draw(st.integers(0, 5))
    good = pickle.dumps({"a": [Payload("exit 1"), 1], "b": {"c": (1, 2), "d": {3}}}, protocol)
    changed = data.draw(mutated(good) | st.binary(max_size=300))
    with little_room():
        try:
            for _ in walk(read_pickle(io.BytesIO(changed), len(changed))):
                pass
        except pickle.UnpicklingError:
            pass


# -- zip files -------------------------------------------------------------------------------------


def record(name: bytes, data: bytes, at: int, *, size: int | None = None) -> tuple[bytes, bytes]:
    """A stored record, and its entry in the directory, which may claim another size."""
    crc, size = zlib.crc32(data), len(data) if size is None else size
    local = (
        struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 0, 0, 0, 0, 0, crc, *[len(data)] * 2, len(name), 0
        )
        + name
        + data
    )
    return local, entry(name, crc, size, at)


def entry(name: bytes, crc: int, size: int, at: int, method: int = 0, extra: bytes = b"") -> bytes:
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02",
            0,
            0,
            0,
            method,
            0,
            0,
            crc,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            at,
        )
        + name
        + extra
    )


def archive(body: bytes, directory: list[bytes], count: int | None = None) -> bytes:
    joined = b"".join(directory)
    number = min(0xFFFF, len(directory) if count is None else count)
    return (
        body
        + joined
        + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, number, number, len(joined), len(body), 0)
    )


def many_readers(count: int) -> bytes:
    """Entries of many names for one pickle."""
    pickled = b"\x80\x02" + b"]" * 100_000 + b"."
    body, _ = record(b"x/data.pkl", pickled, 0)
    return archive(body, [entry(b"%d/data.pkl" % n, 0, len(pickled), 0) for n in range(count)])


def many_storages(count: int, *, same: bool) -> bytes:
    """Storages of one key, and a pickle of many tensors that look at it."""
    tensors = b"".join(b"h\x01(h\x02K\x00(K\x01t(K\x01t\x89NtR" for _ in range(20_000))
    pickled = (
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x01"
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01"
            b"tQq\x0200]("
        )
        + tensors
        + b"e."
    )
    body, first = record(b"x/data.pkl", pickled, 0)
    directory = [first]
    for number in range(count):
        local, found = record(b"%d/data/0" % (0 if same else number), bytes(4), len(body))
        body += local
        directory.append(found)
    return archive(body, directory)


@pytest.mark.parametrize(
    "data",
    [many_readers(5000), many_storages(20_000, same=True), many_storages(20_000, same=False)],
    ids=["one pickle", "one name", "one key"],
)
def test_records_that_are_shared(data: bytes) -> None:
    with little_room():
        read(torch_zip.parse, data)


ABSURD = [0, 1, 0xFFFFFFFE, 0xFFFFFFFF]


@pytest.mark.parametrize("size", ABSURD)
@pytest.mark.parametrize("at", ABSURD)
@pytest.mark.parametrize("wide", [0, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_sizes_that_lie(size: int, at: int, wide: int) -> None:
    body, _ = record(b"x/data/0", bytes(5000), 0)
    extra = struct.pack("<HHQQQ", 1, 24, wide, wide, wide)
    with little_room():
        for method in (0, 8):
            directory = [entry(b"x/data/0", 0, size, at, method, extra)]
            read(torch_zip.parse, archive(body, directory))
            read(torch_zip.parse, archive(body, directory, 0xFFFF))
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0, 0, 0, 0, wide, wide, wide, wide)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, wide, 1)
        read(torch_zip.parse, archive(body + end + locator, []))


@pytest.mark.parametrize("claim", [1 << 33, 1 << 40, (1 << 63) - 1])
def test_a_legacy_file_that_claims_much(claim: int) -> None:
    head = LEGACY[: LEGACY.index(b".\x80\x02") + 1]
    for code in (b"\x8e", b"\x96", b"\x95"):
        data = head + b"\x80\x05" + code + struct.pack("<Q", claim) + bytes(100)
        with little_room():
            assert torch_legacy.parse(source(data)) is None


def test_one_storage_under_one_key_often() -> None:
    keys = pickle.dumps(["0"] * 5000, 2)
    whole = LEGACY[: LEGACY.rindex(b"\x80\x02")] + keys + bytes(8) * 5000
    with little_room():
        read(torch_legacy.parse, whole)


def test_a_product_without_end(tmp_path: Path) -> None:
    """A shape of a few large integers, each shared by many dimensions."""
    pickled = (
        b"\x80\x02\x8b" + struct.pack("<i", 400_000) + b"\x7f" * 400_000 + b"q\x000"
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
        b"K\x00(" + b"h\x00" * 60 + b"t(" + b"K\x01" * 60 + b"t\x89NtR."
    )
    one, first = record(b"x/data.pkl", pickled, 0)
    two, second = record(b"x/data/0", bytes(4), len(one))
    path = tmp_path / "a.pt"
    path.write_bytes(archive(one + two, [first, second]))
    with little_room():
        made = open_checkpoint(path)
    assert made.schema.tensors[0].name == "storage.0"


# -- folders ---------------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]) | st.just("\udcff"),
    min_size=1,
    max_size=40,
).filter(lambda name: name not in (".", "..", ".ckpt"))


@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(["", ".pt", "-00001-of-00002.bin"]))
def test_names_of_folders(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], end: str
) -> None:
    root = tmp_path_factory.mktemp("names")
    below = root
    for name in names:
        below /= name
        below.mkdir(exist_ok=True)
    (below / f"{names[0]}{end}").write_bytes(b"x" * 100)
    made = open_checkpoint(root)
    assert len(made.files) == 1
    load_schema(dump_schema(made.schema))
    read_or_refuse(lambda: survey(root, None, root / "store"))


def test_folders_that_nest_deeply(repo: Repo, tmp_path: Path) -> None:
    """No call of Python's nests as deeply as folders may."""
    root = tmp_path / "deep"
    (root / "/".join("d" * 250)).mkdir(parents=True)
    (root / "x.pt").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="nests"):
        repo.commit_path(root, message="deep")
    read_or_refuse(lambda: survey(tmp_path, None, repo.folder))
    with pytest.raises(CorruptionError):
        safe_path("/".join("d" * 250))


def test_names_as_long_as_they_can_be(repo: Repo, tmp_path: Path) -> None:
    path = tmp_path / ("\u6f22" * 85)
    path.mkdir()
    (path / path.name).write_bytes(b"x" * 100)
    made = repo.commit_path(path, message="long")
    repo.checkout_files(made.id, tmp_path / "out" / path.name)
    assert (tmp_path / "out" / path.name / path.name).read_bytes() == b"x" * 100
