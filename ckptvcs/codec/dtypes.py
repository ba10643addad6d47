"""The element types of stored tensors, by the names safetensors uses.

numpy has no bfloat16 and no float8, so arrays travel as unsigned integers of the same width
("words", see `ckptvcs.codec.words`) and the name of the type travels beside them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type: `size` bytes an element, made of words of `word` bytes.

    A complex number is two words; everything else is one.  `floating` says that a word is an
    IEEE-like float with its sign in the top bit.
    """

    name: str
    size: int
    word: int
    floating: bool


_TABLE = [
    *(
        DType(f"{letter}{bits}", bits // 8, bits // 8, False)
        for letter in "IU"
        for bits in (8, 16, 32, 64)
    ),
    *(DType(f"F{bits}", bits // 8, bits // 8, True) for bits in (16, 32, 64)),
    DType("BF16", 2, 2, True),
    DType("BOOL", 1, 1, False),
    *(
        DType(name, 1, 1, False)
        for name in ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4")
    ),
    DType("C32", 4, 2, True),
    DType("C64", 8, 4, True),
    DType("C128", 16, 8, True),
]

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""Every known element type by name."""

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The types of words that lossy coding may touch."""

_OF_COMPLEX = {"C32": "F16", "C64": "F32", "C128": "F64"}


def float_type(dtype: str) -> str:
    """The type of the words of a complex type; any other type itself."""
    return _OF_COMPLEX.get(dtype, dtype)


def can_be_lossy(dtype: str) -> bool:
    """Whether a tensor of a type consists of words that lossy coding may touch."""
    return float_type(dtype) in WEIGHT_DTYPES
