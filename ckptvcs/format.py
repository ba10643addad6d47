"""What a repository says of itself: its format, and what a program must know to use it.

docs/format.md, "format".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ckptvcs.errors import CorruptionError, UnsupportedVersionError
from ckptvcs.store import disk

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
    try:
        fields = json.loads(disk.read_text(folder / "format", _MAX_BYTES))
        number, flags = fields["format"], fields.setdefault("flags", {})
        known = type(number) is int and number > 0 and all(
            isinstance(row, list) and all(isinstance(flag, str) for flag in row)
            for row in flags.values()
        )  # fmt: skip
    except OSError as error:
        raise disk.storage_error(error, f"open {folder}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"{folder / 'format'} is not readable") from error
    if not known:
        raise CorruptionError(f"{folder / 'format'} holds no format")
    return dict(fields)


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
        StorageError: it cannot be written.
    """
    fields = _format(folder)
    flags = fields["flags"].setdefault(operation, [])
    missing = [flag for flag in wanted if flag not in flags]
    if missing:
        flags += missing
        write_format(folder, fields)


def write_format(folder: Path, fields: dict[str, Any]) -> None:
    """Write the `format` file, whole or not at all.  Raises StorageError."""
    disk.replace(folder / "format", json.dumps(fields) + "\n", folder / "tmp")
