"""What a repository says of itself: its format, and its settings.

Lower layers get values, never these files.  docs/format.md, "format"; docs/cli.md, "Settings".
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ckptvcs.codec.spec import parse_codec
from ckptvcs.errors import CorruptionError, InvalidInputError, UnsupportedVersionError
from ckptvcs.store.local import storage_error, sync_directory

FORMAT = 1
"""The newest format that this program reads, and the one it writes."""

FLAGS = {"read": frozenset({"near", "near-2"}), "write": frozenset[str](), "gc": frozenset[str]()}
"""What a repository may ask of a program that reads, writes or sweeps it, as far as is known."""


@dataclass(frozen=True)
class Config:
    """The settings.

    A new keyframe is started when a chain would be deeper than `keyframe_depth`, or when its
    deltas together take more than `keyframe_bytes` times the bytes of its keyframe.
    """

    codec: str = "near"
    keyframe_depth: int = 64
    keyframe_bytes: float = 4.0


def default_text(codec: str | None = None) -> str:
    """The settings of a new repository, as text.  Raises InvalidInputError: no such codec."""
    name = Config.codec if codec is None else codec
    parse_codec(name)
    return (
        f"# Settings of this repository; docs/cli.md describes them.\ncodec = {json.dumps(name)}\n"
    )


def load_config(path: Path) -> Config:
    """Read the settings; what is missing has its default, and so has a missing file.

    Raises:
        InvalidInputError: the file is not TOML, or holds an unknown key or a bad value.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}") from error
    known = {field.name.replace("_", "-"): field for field in fields(Config)}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        field = known.get(key)
        if field is None:
            raise InvalidInputError(
                f"{path} has an unknown key '{key}'", hint=f"keys: {', '.join(known)}"
            )
        wanted: type[Any] = type(field.default)
        number = wanted is float and type(value) is int
        if (type(value) is not wanted and not number) or (wanted is not str and value <= 0):
            raise InvalidInputError(f"{path}: '{key}' is no valid {wanted.__name__}")
        settings[field.name] = wanted(value)
    config = Config(**settings)
    parse_codec(config.codec)
    return config


def _format(folder: Path) -> dict[str, Any]:
    try:
        fields = json.loads((folder / "format").read_text("utf-8"))
        number, flags = fields["format"], fields.setdefault("flags", {})
        known = type(number) is int and all(isinstance(flag, list) for flag in flags.values())
    except OSError as error:
        raise storage_error(error, f"open {folder}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
            + ", ".join(map(str, unknown)),
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
    temporary = folder / "tmp" / f"format-{secrets.token_hex(8)}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "format")
        sync_directory(folder)
    except OSError as error:
        raise storage_error(error, f"write {folder / 'format'}") from error
