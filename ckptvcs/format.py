"""What a repository says of itself: its format, and what a program must know to use it.

docs/format.md, "format".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptvcs.errors import CorruptionError, UnsupportedVersionError
from ckptvcs.history.canonical import CHECK, load, seal
from ckptvcs.store import disk
from ckptvcs.store.leases import turn
from ckptvcs.store.local import LocalBackend

FORMAT = 1
"""The newest format that this program reads, and the one it writes."""

_MAX_BYTES = 1 << 16

FLAGS = {
    "read": frozenset({"near", "near-2", "patches"}),
    "write": frozenset[str](),
    "gc": frozenset({"drops", "pins"}),
}
"""What a repository may ask of a program that reads, writes or sweeps it, as far as is known."""


def _format(folder: Path) -> dict[str, Any]:
    name = folder / "format"
    try:
        data = disk.read_text(name, _MAX_BYTES).encode()
    except OSError as error:
        raise disk.storage_error(error, f"open {folder}") from error
    except ValueError as error:
        raise CorruptionError(f"{name} is not readable") from error
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
        fields = _format(folder)
        flags = fields["flags"].setdefault(operation, [])
        flags += _missing(fields, operation, wanted)
        write_format(folder, fields)


def _missing(fields: dict[str, Any], operation: str, wanted: tuple[str, ...]) -> list[str]:
    there = fields["flags"].get(operation, [])
    return [flag for flag in wanted if flag not in there]


def write_format(folder: Path, fields: dict[str, Any], *, new: bool = False) -> None:
    """Write the `format` file, whole or not at all.  Raises StorageError, or FileExistsError where
    it was to be a `new` one.
    """
    fields.pop(CHECK, None)
    disk.replace(folder / "format", seal(fields).decode() + "\n", folder / "tmp", new=new)
