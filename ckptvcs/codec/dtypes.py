"""The element types of stored tensors, by the names that safetensors uses.

numpy has no bfloat16 and no float8. Functions therefore take arrays of unsigned integers
(`ckptvcs.codec.words.Words`) and the name of the element type.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """An element type: an element has `size` bytes, a word has `word` bytes.

    A complex element is two words, any other element is one word. A word is a float with its sign
    in the top bit if `floating` is set. `torch` is torch's name of the type. `storage` is the name
    of its storage class in old torch files, or "" if it has none.
    """

    name: str
    size: int
    word: int
    floating: bool
    torch: str
    storage: str = ""

    @property
    def numpy(self) -> str | None:
        """Return numpy's name of the type, or None if numpy lacks it."""
        return None if self.torch.startswith(_NOT_OF_NUMPY) else self.torch


_NOT_OF_NUMPY = ("bfloat16", "complex32", "float8_", "float4_")

_TABLE = [
    DType("I8", 1, 1, False, "int8", "CharStorage"),
    DType("I16", 2, 2, False, "int16", "ShortStorage"),
    DType("I32", 4, 4, False, "int32", "IntStorage"),
    DType("I64", 8, 8, False, "int64", "LongStorage"),
    DType("U8", 1, 1, False, "uint8", "ByteStorage"),
    DType("U16", 2, 2, False, "uint16"),
    DType("U32", 4, 4, False, "uint32"),
    DType("U64", 8, 8, False, "uint64"),
    DType("F16", 2, 2, True, "float16", "HalfStorage"),
    DType("F32", 4, 4, True, "float32", "FloatStorage"),
    DType("F64", 8, 8, True, "float64", "DoubleStorage"),
    DType("BF16", 2, 2, True, "bfloat16", "BFloat16Storage"),
    DType("BOOL", 1, 1, False, "bool", "BoolStorage"),
    DType("F8_E4M3", 1, 1, False, "float8_e4m3fn"),
    DType("F8_E5M2", 1, 1, False, "float8_e5m2"),
    DType("F8_E4M3FNUZ", 1, 1, False, "float8_e4m3fnuz"),
    DType("F8_E5M2FNUZ", 1, 1, False, "float8_e5m2fnuz"),
    DType("F8_E8M0", 1, 1, False, "float8_e8m0fnu"),
    DType("F4", 1, 1, False, "float4_e2m1fn_x2"),
    DType("C32", 4, 2, True, "complex32"),
    DType("C64", 8, 4, True, "complex64", "ComplexFloatStorage"),
    DType("C128", 16, 8, True, "complex128", "ComplexDoubleStorage"),
]

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""Every known element type by name."""

OF_TORCH = {dtype.torch: dtype.name for dtype in _TABLE}
"""torch's name of an element type -> the name here."""

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The types whose words a lossy method may encode."""

_OF_COMPLEX = {"C32": "F16", "C64": "F32", "C128": "F64"}


def float_type(dtype: str) -> str:
    """Return the type of the real part of a complex type, or `dtype` itself."""
    return _OF_COMPLEX.get(dtype, dtype)


def can_be_lossy(dtype: str) -> bool:
    """Return whether a lossy method may encode tensors of this type."""
    return float_type(dtype) in WEIGHT_DTYPES
