"""Settings of one repository, typed, from .ckpt/config.toml; lower layers get values only."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ckptvcs.codec.spec import parse_codec
from ckptvcs.errors import InvalidInputError

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
