"""Notes about files that could not be parsed, and the cost.

Such a file is stored exactly.  Its tensors have no names, are not compressed with loss, and Python
gets bytes in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptvcs.checkpoint import torch_zip
from ckptvcs.checkpoint.conventions import TENSOR_SUFFIXES
from ckptvcs.checkpoint.layout import Layout, Source
from ckptvcs.checkpoint.roles import LOSSY
from ckptvcs.codec.dtypes import can_be_lossy
from ckptvcs.history.schema import LITTLE, Schema
from ckptvcs.text import size

NOTED = 1 << 14
"""The least number of bytes of exact floats that get a note."""

_SHARE = 0.01  # the least share of a checkpoint's bytes in exact floats that gets a note
_LARGE = 1 << 24  # bytes from which a file of any name gets a note


def why_raw(source: Source) -> str:
    """Return why no parser of torch or safetensors accepts a file."""
    if torch_zip.starts_like_zip(source):
        return torch_zip.why_not(source)
    head = source.read(0, min(source.size, 8))
    kinds = {
        b"\x1f\x8b": "it is compressed by gzip",
        b"\x28\xb5\x2f\xfd": "it is compressed by zstd",
        b"BZh": "it is compressed by bzip2",
        b"\xfd7zXZ": "it is compressed by xz",
        b"\x80": "it is a pickle, not a torch.save file",
        b"\x89HDF": "it is an HDF5 file",
        b"\x93NUMPY": "it is a numpy file",
        b"GGUF": "it is a GGUF file",
        b"\x7fELF": "it is a program",
    }
    matches = (text for start, text in kinds.items() if head.startswith(start))
    return next(matches, "no structure of torch or safetensors was found")


def notes(files: Iterable[tuple[str, Source, Layout]]) -> Iterator[str]:
    """Yield a note for each file that no parser reads completely."""
    for path, source, layout in files:
        matters = path.lower().endswith(TENSOR_SUFFIXES) or source.size >= _LARGE
        if layout.format == "raw" and layout.problem is not None and matters:
            cost = f"{size(source.size)} stored exactly, as bytes"
            yield f"{path}: not readable as tensors ({layout.problem}); {cost}"
        elif layout.format != "raw" and layout.problem is not None:
            cost = f"{size(source.size)} stored exactly, its tensors without names"
            yield f"{path}: its objects are not readable ({layout.problem}); {cost}"
        yield from (f"{path}: {remark}" for remark in layout.remarks)


def unknown_floats(schema: Schema, size_bytes: int) -> Iterator[str]:
    """Yield a note about float tensors without evidence that they are weights or moments.

    There is none if they are only a small share of the `size_bytes` of the checkpoint.
    """
    sizes = [
        info.size_bytes
        for info in schema.tensors
        if not info.inline
        and info.role not in LOSSY
        and can_be_lossy(info.dtype)
        and info.order == LITTLE
    ]
    if sum(sizes) >= max(NOTED, _SHARE * size_bytes):
        tensors = "1 tensor" if len(sizes) == 1 else f"{len(sizes)} tensors"
        yield (
            f"{tensors}, {size(sum(sizes))}, stored exactly: not known as weights or moments; "
            "see 'ckpt show --roles'"
        )
