"""Hostile pickles are data: nothing runs, nothing grows."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.checkpoint.pickle_reader import Inert, TensorRef, read_pickle, walk
from ckptvcs.history.schema import View
from ckptvcs.repo import Repo
from tests.helpers.profiles import short


def read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), len(data))


class Payload:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_nothing_is_called(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    tree = read(pickle.dumps({"a": Payload(f"touch {proof}")}))
    assert isinstance(tree["a"], Inert)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", short(range(6), [2, 4]))
def test_every_protocol(protocol: int) -> None:
    value = {"list": [1, 2.5, None, True], "text": "é", "bytes": b"\xff", "big": 1 << 70}
    tree = read(pickle.dumps(value, protocol))
    assert tree["list"] == value["list"]
    assert tree["text"] == value["text"]
    assert tree["big"] == value["big"]


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def shared(levels: int) -> bytes:
    """Lists that hold the one below twice: 2^levels paths."""
    out = b"\x80\x04]\x94"
    for level in range(levels):
        out += b"]\x94(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return out + b"."


def keyed(levels: int, end: bytes) -> bytes:
    """A tuple that holds the one below twice, hashed as a key or as a member."""
    out = b"\x80\x04)\x94"
    for level in range(levels):
        out += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x94"
    return out + end


def colliding(count: int) -> bytes:
    """A dict of integers that all have the hash 0."""
    keys = (n * ((1 << 61) - 1) for n in range(1, count))
    return (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c" + key.to_bytes(12, "little", signed=True) + b"N" for key in keys)
        + b"u."
    )


BOMBS = {
    "key": keyed(60, b"}h<Ns."),
    "keys": keyed(60, b"}(h<Nu."),
    "dict": keyed(60, b"(h<Nd."),
    "set member": keyed(60, b"\x8f(h<\x90."),
    "frozen member": keyed(60, b"(h<\x91."),
    "ordered dict": keyed(60, b"ccollections\nOrderedDict\n](h<N\x86e\x85R."),
    "colliding": colliding(30_000),
    "memo index": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b".",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "text": b"\x80\x02X\xff\xff\xff\xff.",
    "builtin bytearray": b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
    "deep": nested(200_000),
    "shared": shared(60),
    "many globals": b"".join(b"cm%d\nn\n0" % i for i in range(20_000)) + b"N.",
    "calls": b"\x80\x02]cos\na\nq\x00" + b"h\x00)R0" * 1_000_000 + b"0.",
    "lists": b"\x80\x02" + b"]" * 6_000_000 + b".",
    "marks": b"\x80\x02" + b"(" * 6_000_000 + b".",
    "no stop": b"\x80\x02}",
    "stack underflow": b"\x80\x02ee.",
    "unhashable": b"\x80\x02}]Ns.",
    "attributes of a global": b"cos\nsystem\n}b.",
    "call a list": b"]\x8f\x85R.",
}


@pytest.mark.parametrize("name", short(BOMBS, BOMBS.keys() - {"calls", "lists"}))
def test_bombs_cost_nothing(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for _ in walk(read(BOMBS[name])):
            pass
    except pickle.UnpicklingError:
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kB


@pytest.mark.parametrize(
    "name",
    short(["memo index", "deep", "shared", "many globals", "long", "key"], ["memo index", "key"]),
)
def test_hostile_files_are_committed_as_they_are(name: str, repo: Repo, tmp_path: Path) -> None:
    records = {"data.pkl": BOMBS[name], "data/0": os.urandom(3000), "version": b"3\n"}
    path = tmp_path / "evil.pt"
    writer = torch._C.PyTorchFileWriter(str(path))
    for record, data in records.items():
        writer.write_record(record, data, len(data))
    writer.write_end_of_file()
    result = repo.commit_path(path, message="evil")
    repo.checkout_files(result.id, tmp_path / "back.pt")
    assert (tmp_path / "back.pt").read_bytes() == path.read_bytes()


def test_claims_outside_a_storage_are_ignored(repo: Repo, tmp_path: Path) -> None:
    torch.save({"w": torch.randn(200)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    lying = data.replace(b"K\xc8\x85", b"M\xff\xff\x85"[:3])  # shape (200,) becomes larger
    (tmp_path / "a.pt").write_bytes(lying)
    result = repo.commit_path(tmp_path / "a.pt", message="lying")
    repo.checkout_files(result.id, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == lying
    assert not repo.verify().damage


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((0, 1 << 63), (1, 1), 0),
        ((200,), (1,), 1 << 60),
        ((1 << 62, 1 << 62), (0, 0), 0),
        ((200,), (1 << 70,), 0),
        ((1,) * 100, (1,) * 100, 0),
        ((1 << 2000,), (1,), 0),
        ((0,), (1,), 1 << 64),
        ((10**9, 10**9), (0, 0), 0),
    ],
)
def test_tensors_that_make_absurd_claims(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, repo: Repo, tmp_path: Path
) -> None:
    from ckptvcs.checkpoint import torch_writer

    leaf = torch_writer.Leaf(0, 800, View("", "F32", offset, shape, stride))
    pickled = torch_writer.dump_pickle({"w": 0}, lambda value, _: leaf if value == 0 else None)
    payload = torch_writer.Payload(800, lambda: iter([bytes(800)]))
    with (tmp_path / "a.pt").open("wb") as out:
        torch_writer.write_zip(out.write, "a", pickled, [payload])
    result = repo.commit_path(tmp_path / "a.pt", message="x")
    repo.checkout_files(result.id, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    assert not repo.verify().damage


def test_one_huge_name_for_many_tensors(repo: Repo, tmp_path: Path) -> None:
    weights = {f"{n}": torch.randn(200) for n in range(300)}
    torch.save({"x" * 1_000_000: weights}, tmp_path / "a.pt")
    result = repo.commit_path(tmp_path / "a.pt", message="x")
    assert result.stored_bytes < 2_000_000
    repo.checkout_files(result.id, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_a_tensor_is_seen_with_its_window(tmp_path: Path) -> None:
    torch.save({"deep": [{"w": torch.randn(4, 6)[:, 2:]}]}, tmp_path / "x.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        tree = read(archive.read("x/data.pkl"))
    found = [(path, node) for path, node in walk(tree) if isinstance(node, TensorRef)]
    assert [path for path, _ in found] == [("deep", "0", "w")]
    ref = found[0][1]
    assert isinstance(ref, TensorRef)
    assert (ref.offset, ref.shape, ref.stride) == (2, (4, 4), (6, 1))


# -- what a few bytes may cost ---------------------------------------------------------------------


def ordered_again(count: int, times: int) -> bytes:
    """OrderedDict(one list), over and over."""
    pairs = b"".join(b"J" + struct.pack("<i", n) + b"N\x86" for n in range(count))
    return (
        b"\x80\x02](ccollections\nOrderedDict\nq\x00]("
        + pairs
        + b"e\x85q\x01"
        + b"h\x00h\x01R" * times
        + b"e."
    )


def arguments_again(count: int, times: int) -> bytes:
    """A call with one long row of arguments, which is copied, over and over."""
    return (
        b"\x80\x04](ccollections\nOrderedDict\nq\x00("
        + b"N" * count
        + b"tq\x01}q\x02"
        + b"h\x00h\x01h\x02\x92" * times
        + b"e."
    )


COPIES = {
    "ordered dict": ordered_again(20_000, 20_000),
    "arguments": arguments_again(100_000, 20_000),
    "tuples": b"\x80\x02N" + b"\x85" * 6_000_000 + b".",
    "sets": b"\x80\x04" + b"\x8f" * 3_000_000 + b".",
}


@pytest.mark.parametrize(
    "name",
    ["arguments", *(pytest.param(n, marks=pytest.mark.slow) for n in COPIES if n != "arguments")],
)
def test_copies_are_refused_before_they_take_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(pickle.UnpicklingError, match="memory"):
        read(COPIES[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def test_a_tensor_has_few_sizes() -> None:
    """One tuple of sizes may be that of a million tensors: a long one is not even looked at."""

    class Watched(tuple[int, ...]):
        looks = 0

        def __iter__(self) -> Any:
            Watched.looks += 1
            return super().__iter__()

    from ckptvcs.checkpoint.pickle_reader import StorageRef, tensor_ref

    storage, ones = StorageRef("0", "FloatStorage", 1), Watched([1] * 65)
    assert tensor_ref((storage, 0, ones, ones), None) is None
    assert Watched.looks == 0
    assert tensor_ref((storage, 0, (1,) * 64, (1,) * 64), None) is not None


@pytest.mark.parametrize("protocol", short(range(6), [2]))
def test_what_programs_write_is_within_bounds(protocol: int) -> None:
    """However long it is: each of its bytes costs less than is allowed for one."""
    from ckptvcs.checkpoint import pickle_reader

    count = 50_000
    values: list[Any] = [
        [[] for _ in range(count)],
        [{} for _ in range(count)],
        [(n,) for n in range(count)],
        dict.fromkeys(range(count)),
        [{"a": n, "b": n / 3} for n in range(count)],
        [str(n) for n in range(count)],
        [(None, None) for _ in range(count)],
    ]
    for value in values:
        data = pickle.dumps(value, protocol)
        reader = pickle_reader.InertUnpickler(io.BytesIO(data), len(data))
        assert reader.load() == value
        assert reader.charged_bytes <= pickle_reader.ROOM_PER_BYTE * len(data)
