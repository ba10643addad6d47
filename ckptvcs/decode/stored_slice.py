"""Read the encoded slices of a frame."""

from __future__ import annotations

from ckptvcs.codec.dtypes import DType
from ckptvcs.codec.frame import PATCH, slices_of
from ckptvcs.errors import CorruptionError, TruncatedError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.recipe import NO_HASH, Frame, slice_hash
from ckptvcs.store.ids import ObjectId

_PATCH = bytes([PATCH])


def read_slice(
    catalog: Catalog, bundle: ObjectId, frame: Frame, number: int, *, unhashed_patch: bool = False
) -> bytes:
    """Read one encoded slice and check it against the hash in its bundle.

    A slice of an exact patch may lack a hash if `unhashed_patch` is set: the tensor that it decodes
    to has one.

    Raises:
        TruncatedError, CorruptionError: the slice is damaged or missing.
    """
    if number >= len(frame.slices):
        raise CorruptionError(f"bundle {bundle[:8]} is damaged: a frame has too few slices")
    offset, length, expected = frame.slices[number]
    data = catalog.store.read_region(bundle, offset, length)
    if len(data) != length:
        raise TruncatedError(f"bundle {bundle[:8]} is truncated")
    if unhashed_patch and expected == NO_HASH and data[:1] == _PATCH:
        return data
    if slice_hash(data) != expected:
        raise CorruptionError(f"bundle {bundle[:8]} is damaged: a slice has the wrong hash")
    return data


def has_slices(frame: Frame, size: int, dtype: DType) -> bool:
    """Return whether a frame has the number of slices of a tensor of `size` bytes and this type."""
    return size % dtype.word == 0 and len(frame.slices) == len(slices_of(size // dtype.word))
