"""The file `format`: the version of a repository and the features that programs must know.

docs/format.md, "format".
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from ckptvcs.errors import CkptError, CorruptionError, UnsupportedVersionError
from ckptvcs.history.canonical_json import CHECK, load, seal, unseal
from ckptvcs.history.fields import NATURAL, TEXT, Fields, many, mapping
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import Backend, read_small, write_once
from ckptvcs.store.leases import turn

FORMAT = 1
"""The newest format that this program reads, and the one it writes."""

FOLDERS = (*packs.FOLDERS, "refs", "leases", "marks", "tmp")
"""The folders of a repository, except the cache."""

_MAX_BYTES = 1 << 16
_MAX_ID = 64

FLAGS = {
    "read": frozenset(
        {"archive", "near", "near-2", "notes", "patches", "provenance", "sparse", "types"}
    ),
    "write": frozenset[str](),
    "gc": frozenset({"drops", "pins"}),
}
"""The features that this program knows, by the operation that needs them."""


_FORMAT = Fields(lambda number, _: number, format=NATURAL, flags=mapping(many(TEXT)))


def is_repository(backend: Backend) -> bool:
    """Return whether `backend` holds a repository, even one whose `format` file is missing."""
    with contextlib.suppress(CkptError, FileNotFoundError):
        return backend.size("format") >= 0
    return any(next(backend.names(name), None) for name in (*packs.FOLDERS, "refs/heads"))


def _format(backend: Backend) -> dict[str, Any]:
    name, hint = f"{backend}/format", "see 'ckpt verify --repair'"
    try:
        data = read_small(backend, "format", _MAX_BYTES)
    except FileNotFoundError as error:
        raise CorruptionError(f"{backend}: file 'format' is missing", hint=hint) from error
    fields = load(data, name)  # users may edit the file: only verify checks its hash
    fields.setdefault("flags", {})
    if not _FORMAT.of_json(fields, name):
        raise CorruptionError(f"{name} has no valid 'format'")
    return fields


def check_format(backend: Backend) -> None:
    """Refuse a repository that this program cannot read.

    Raises:
        UnsupportedVersionError: a newer program wrote it.
        CorruptionError: its `format` file is unreadable.
    """
    number = _format(backend)["format"]
    if number > FORMAT:
        raise UnsupportedVersionError(
            f"{backend} has format {number}, this program reads up to {FORMAT}",
            hint="upgrade ckptvcs",
        )
    require_flags(backend, "read")


def require_flags(backend: Backend, operation: str) -> None:
    """Refuse an operation on a repository with features that this program does not know.

    Raises:
        UnsupportedVersionError: the repository has such features.
        CorruptionError: its `format` file is unreadable.
    """
    required = _format(backend)["flags"].get(operation) or []
    unknown = [flag for flag in required if flag not in FLAGS[operation]]
    if unknown:
        raise UnsupportedVersionError(
            f"{backend} needs features that this program lacks to {operation}: "
            + ", ".join(unknown),
            hint="upgrade ckptvcs",
        )


def flags_of(backend: Backend, operation: str) -> list[str]:
    """Return the flags of an operation.  Raises CorruptionError."""
    return list(_format(backend)["flags"].get(operation, []))


def raise_flags(backend: Backend, operation: str, *flags: str) -> None:
    """Record durably that an operation needs programs that know `flags`, forever.

    Raises:
        BusyError: other processes keep changing the file.
        StorageError: the file cannot be written.
    """
    if not _missing(_format(backend), operation, flags):
        return
    with turn(backend):  # two writers may raise flags at once
        # The new file does not show that the names of the old one may not be durable yet.
        backend.size("format")
        backend.settle_seen()
        fields = _format(backend)
        present = fields["flags"].setdefault(operation, [])
        present += _missing(fields, operation, flags)
        write_format(backend, fields)


def _missing(fields: dict[str, Any], operation: str, flags: tuple[str, ...]) -> list[str]:
    present = fields["flags"].get(operation, [])
    return [flag for flag in flags if flag not in present]


def new_format(repository_id: str | None = None) -> dict[str, Any]:
    """Return the fields of a repository without flags; its id is random by default."""
    flags: dict[str, list[str]] = {operation: [] for operation in FLAGS}
    return {"format": FORMAT, "id": repository_id or os.urandom(16).hex(), "flags": flags}


def check_seal(backend: Backend) -> None:
    """Check the hash of the `format` file.

    Raises:
        CorruptionError: the file was changed after this program wrote it.
    """
    _format(backend)
    data = read_small(backend, "format", _MAX_BYTES)
    unseal(data.removesuffix(b"\n"), "format", frozenset(("format", "id", "flags")))


def read_id(backend: Backend) -> str | None:
    """Return the id of a repository, or None if it cannot be read."""
    with contextlib.suppress(CkptError):
        value = _format(backend).get("id")
        return value if isinstance(value, str) and 0 < len(value) <= _MAX_ID else None
    return None


def repair_format(backend: Backend, copy: Backend | None) -> bool:
    """Rewrite a damaged or missing `format` file; return whether it was damaged.

    The id is the old one, otherwise that of `copy`.  All flags are raised: nothing tells any more
    which of them the repository needs.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        check_seal(backend)
    except CorruptionError:
        fields = new_format(read_id(backend) or (read_id(copy) if copy is not None else None))
        fields["flags"] = {operation: sorted(flags) for operation, flags in FLAGS.items()}
        backend.delete("format")
        write_format(backend, fields)
        return True
    return False


def write_format(backend: Backend, fields: dict[str, Any], *, new: bool = False) -> None:
    """Write the `format` file atomically.

    Raises:
        ConflictError: the file is `new`, but exists.
        StorageError: the file cannot be written.
    """
    fields.pop(CHECK, None)
    data = seal(fields) + b"\n"
    if new:
        write_once(backend, "format", data)
    else:
        backend.replace("format", data)
