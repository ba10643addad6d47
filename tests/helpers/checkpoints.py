"""Checkpoint files and states with every type, layout and object."""

from __future__ import annotations

import argparse
import collections
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ckptvcs.checkpoint.pickle_reader import TensorRef, read_pickle, walk


def every_dtype() -> dict[str, torch.Tensor]:
    names = [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
        "complex128",
    ]
    out = {}
    for name in names:
        dtype = getattr(torch, name)
        raw = torch.randint(0, 2 if name == "bool" else 120, (16 * 300,), dtype=torch.uint8)
        out[name] = raw.view(dtype)[:250]
    out["complex32"] = torch.randn(300, 2).half().view(torch.complex32).squeeze(-1)
    return out


def views() -> dict[str, Any]:
    base = torch.randn(40, 50)
    return {
        "base": base,
        "slice": base[3:20, 5:],
        "transposed": base.T,
        "strided": base[::2, ::3],
        "expanded": torch.randn(1, 300).expand(30, 300),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "empty 2d": torch.empty(3, 0, 4),
        "flipped": base.flip(0),
        "conjugate": torch.randn(200, dtype=torch.complex64).conj(),
        "negative": torch.randn(200, dtype=torch.complex64).imag,
        "big storage": torch.randn(10_000)[100:110],
    }


def odd_objects() -> dict[str, Any]:
    return {
        "args": argparse.Namespace(lr=0.1, layers=[1, 2], nested=argparse.Namespace(x=None)),
        "numpy": np.random.default_rng(0).normal(size=(50, 60)),
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        },
        "ordered": collections.OrderedDict(a=1),
        "set": {1, 2},
        "tuple": (1, (2, 3)),
        "counter": collections.Counter("hello"),
        "bytes": b"\x00\xff",
        "big": 1 << 100,
        "path": Path("x"),
        "complex": 1j,
        "none": None,
        "slice": slice(1, 2),
    }


def trainer_directory(root: Path, state: dict[str, Any], step: int) -> Path:
    """A directory as the Trainer of Hugging Face writes it."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file(state["model"], folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(state["optimizer"], folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save(odd_objects()["rng"], folder / "rng_state.pth")
    torch.save(argparse.Namespace(output_dir="out"), folder / "training_args.bin")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "config.json").write_text("{}")
    return folder


def save_big(state: Any, path: Path, order: bytes = b"big") -> None:
    """As torch saves it on such a machine: the words of each storage the other way round."""
    plain = io.BytesIO()
    torch.save(state, plain)
    with zipfile.ZipFile(plain) as old:
        pickled = old.read("archive/data.pkl")
        kinds = {
            node.storage.key: STORAGES[node.storage.type_name]
            for _, node in walk(read_pickle(io.BytesIO(pickled), len(pickled)))
            if isinstance(node, TensorRef)
        }
        writer = torch._C.PyTorchFileWriter(str(path))
        for full in old.namelist():
            name, data = full.removeprefix("archive/"), old.read(full)
            if name.startswith("data/"):
                words = np.frombuffer(data, f"u{kinds[name[5:]]}")
                data = words.byteswap().tobytes()
            elif name == "byteorder":
                data = order
            if name not in (
                "version",
                ".data/serialization_id",
                ".format_version",
                ".storage_alignment",
            ):
                writer.write_record(name, data, len(data))
        writer.write_end_of_file()


STORAGES = {
    "FloatStorage": 4,
    "DoubleStorage": 8,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "ComplexFloatStorage": 4,
    "ComplexDoubleStorage": 8,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
