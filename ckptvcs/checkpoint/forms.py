"""Which tensors of a commit are near, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping

from ckptvcs.checkpoint.roles import LOSSY
from ckptvcs.codec.dtypes import can_be_lossy
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import INEXACT, ErrorReport
from ckptvcs.store.ids import ObjectId


def near_tensors(catalog: Catalog, name: ObjectId, fidelity: Mapping[str, str]) -> set[int]:
    """Return the stored tensors that are restored near, given the form of each part.

    Other tensors of a near part are exact: their role requires it, or they had no error.
    """
    lossy = _lossy(catalog, name, fidelity)
    errors = catalog.errors(name)
    if not errors:  # they were dropped
        return set(lossy)
    # Only one of several tensors with the same values has an error report.
    inexact = {lossy[number] for number in errors if number in lossy}
    return {number for number, value in lossy.items() if value in inexact}


def near_errors(catalog: Catalog, name: ObjectId) -> dict[int, ErrorReport]:
    """Return the errors of the near form of a commit, by position of the tensor in its schema.

    Tensors with the same values have the same error.
    """
    errors = catalog.errors(name)
    if not errors:
        return {}
    gone = catalog.dropped().parts.get(name, frozenset())
    lossy = _lossy(catalog, name, {p: "near" for p in catalog.commit(name).parts if p not in gone})
    known = {lossy[number]: error for number, error in errors.items() if number in lossy}
    return {n: known[value] for n, value in lossy.items() if value in known} | errors


def _lossy(catalog: Catalog, name: ObjectId, fidelity: Mapping[str, str]) -> dict[int, bytes]:
    """Return the hash of the near form of each tensor that may be near."""
    commit = catalog.commit(name)
    schema, found = catalog.schema(commit.schema), dict[int, bytes]()
    for part, state in commit.parts.items():
        if fidelity.get(part) in INEXACT:
            stored = schema.stored(part)
            hashes = catalog.all_values(state.values, len(stored))
            for number, value in zip(stored, hashes, strict=True):
                info = schema.tensors[number]
                if info.role in LOSSY and can_be_lossy(info.dtype):
                    found[number] = value
    return found
