"""What a repository says of itself: its format, and what a program must know to use it.

docs/format.md, "format".
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ckptvcs.errors import CkptError, CorruptionError, UnsupportedVersionError
from ckptvcs.history.canonical_json import CHECK, load, seal, unseal
from ckptvcs.store import disk
from ckptvcs.store import pack as packs
from ckptvcs.store.backend import read_small
from ckptvcs.store.leases import turn
from ckptvcs.store.local import LocalBackend

FORMAT = 1
"""The newest format that this program reads, and the one it writes."""

FOLDERS = (*packs.FOLDERS, "refs", "leases", "marks", "tmp")
"""The folders of a repository, but for the cache."""

_MAX_BYTES = 1 << 16
_MAX_ID = 64

FLAGS = {
    "read": frozenset({"near", "near-2", "patches", "types"}),
    "write": frozenset[str](),
    "gc": frozenset({"drops", "pins"}),
}
"""What a repository may ask of a program that reads, writes or sweeps it, as far as is known."""


def is_repository(folder: Path) -> bool:
    """Whether there is a repository, be it one that has lost its `format` file."""
    if (folder / "format").is_file():
        return True
    there = LocalBackend(folder)
    return any(next(there.names(name), None) for name in (*packs.FOLDERS, "refs/heads"))


def _format(folder: Path) -> dict[str, Any]:
    name, hint = folder / "format", "see 'ckpt verify --repair'"
    try:
        data = read_small(LocalBackend(folder), "format", _MAX_BYTES)
    except FileNotFoundError as error:
        raise CorruptionError(f"{folder} has lost its file 'format'", hint=hint) from error
    fields = load(data, str(name)).fields()  # its check is for verify: it may be changed by hand
    number, flags = fields.get("format"), fields.setdefault("flags", {})
    if type(number) is not int or number < 1 or not isinstance(flags, dict):
        raise CorruptionError(f"{name} holds no format")
    if not all(
        isinstance(row, list) and all(isinstance(flag, str) for flag in row)
        for row in flags.values()
    ):
        raise CorruptionError(f"{name} holds no flags")
    return fields


def check_format(folder: Path) -> None:
    """Refuse a repository that this program cannot read.

    Raises:
        UnsupportedVersionError: a newer program wrote it.
        CorruptionError: its `format` file is unreadable.
    """
    number = _format(folder)["format"]
    if number > FORMAT:
        raise UnsupportedVersionError(
            f"{folder} has format {number}, this program reads up to {FORMAT}",
            hint="upgrade ckptvcs",
        )
    require_flags(folder, "read")


def require_flags(folder: Path, operation: str) -> None:
    """Refuse what the repository says an older program must not do."""
    asked = _format(folder)["flags"].get(operation) or []
    unknown = [flag for flag in asked if flag not in FLAGS[operation]]
    if unknown:
        raise UnsupportedVersionError(
            f"{folder} needs features that this program lacks to {operation}: "
            + ", ".join(unknown),
            hint="upgrade ckptvcs",
        )


def raise_flags(folder: Path, operation: str, *wanted: str) -> None:
    """Say, durably, that a program must know some flags for an operation.  They are never lowered.

    Raises:
        BusyError: others are changing the file, and do not end.
        StorageError: it cannot be written.
    """
    if not _missing(_format(folder), operation, wanted):
        return
    with turn(LocalBackend(folder)):  # two writers may raise flags at once
        backend = LocalBackend(folder)
        backend.size("format")  # the new file will not tell that the way to it may not be durable
        backend.settle_seen()
        fields = _format(folder)
        flags = fields["flags"].setdefault(operation, [])
        flags += _missing(fields, operation, wanted)
        write_format(folder, fields)


def _missing(fields: dict[str, Any], operation: str, wanted: tuple[str, ...]) -> list[str]:
    there = fields["flags"].get(operation, [])
    return [flag for flag in wanted if flag not in there]


def new_format(own: str | None = None) -> dict[str, Any]:
    """The fields of a repository that is `own`, by default a new one, and asks for nothing."""
    flags: dict[str, list[str]] = {operation: [] for operation in FLAGS}
    return {"format": FORMAT, "id": own or os.urandom(16).hex(), "flags": flags}


def check_seal(folder: Path) -> None:
    """Raises CorruptionError where `format` is not what was written."""
    _format(folder)
    data = read_small(LocalBackend(folder), "format", _MAX_BYTES)
    unseal(data.removesuffix(b"\n"), "format", frozenset(("format", "id", "flags")))


def read_id(folder: Path) -> str | None:
    """The id of a repository, if it can be read."""
    with contextlib.suppress(CkptError):
        own = _format(folder).get("id")
        return own if isinstance(own, str) and 0 < len(own) <= _MAX_ID else None
    return None


def mend_folders(folder: Path) -> list[str]:
    """Make the folders that are missing, or are none; their names.

    Raises:
        StorageError: they cannot be made.
    """
    there = LocalBackend(folder)
    lost = [name for name in FOLDERS if not (folder / name).is_dir()]
    for name in lost:
        there.make_way(name)
        disk.make_folder(folder / name)
    return lost


def mend_format(folder: Path, copy: Path | None) -> bool:
    """Write `format` anew where it is damaged or missing, with its id, or that of a copy, asking
    for all that a repository can ask for; whether it was.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        check_seal(folder)
    except CorruptionError:
        fields = new_format(read_id(folder) or (read_id(copy) if copy is not None else None))
        fields["flags"] = {operation: sorted(known) for operation, known in FLAGS.items()}
        LocalBackend(folder).delete("format")
        write_format(folder, fields)
        return True
    return False


def write_format(folder: Path, fields: dict[str, Any], *, new: bool = False) -> None:
    """Write the `format` file, whole or not at all.  Raises StorageError, or FileExistsError where
    it was to be a `new` one.
    """
    fields.pop(CHECK, None)
    disk.replace(folder / "format", seal(fields).decode() + "\n", folder / "tmp", new=new)
