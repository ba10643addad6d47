"""What a repository says of itself: its format, and its settings.

Lower layers get values, never these files.  docs/format.md, "format"; docs/cli.md, "Settings".
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ckptvcs.codec.spec import parse_codec
from ckptvcs.errors import CorruptionError, InvalidInputError, UnsupportedVersionError
from ckptvcs.store.local import storage_error

FORMAT = 1
"""The newest format that this program reads, and the one it writes."""

DEFAULT_TEXT = """\
# Settings of this repository; docs/cli.md describes them.
codec = "lossless"
"""


@dataclass(frozen=True)
class Config:
    """The settings.

    A new keyframe is started when a chain would be deeper than `keyframe_depth`, or when its
    deltas together take more than `keyframe_bytes` times the bytes of its keyframe.
    """

    codec: str = "lossless"
    keyframe_depth: int = 64
    keyframe_bytes: float = 4.0


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
        number, flags = fields["format"], fields.get("flags", {})
        known = type(number) is int and all(isinstance(flag, list) for flag in flags.values())
    except OSError as error:
        raise storage_error(error, f"open {folder}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{folder / 'format'} is not readable") from error
    if not known:
        raise CorruptionError(f"{folder / 'format'} holds no format")
    return {"format": number, "flags": flags}


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
    unknown = _format(folder)["flags"].get(operation) or []
    if unknown:
        raise UnsupportedVersionError(
            f"{folder} needs features that this program lacks to {operation}: "
            + ", ".join(map(str, unknown)),
            hint="upgrade ckptvcs",
        )
