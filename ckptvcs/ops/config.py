"""The settings of a repository: what they are called, which values they take, where they stand.

Lower layers get values, never the file.  docs/reference/settings.md describes the settings.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ckptvcs.codec.spec import CodecSpec, parse_codec, with_bounds
from ckptvcs.errors import InvalidInputError
from ckptvcs.gc.retention import FIDELITIES, Best, ExactRule
from ckptvcs.store import disk
from ckptvcs.store.backend import Backend
from ckptvcs.store.leases import turn

Value = str | int | float

_LARGEST = 1e9
_MAX_BYTES = 1 << 16
_ALL = (1 << 31) - 1
_log = logging.getLogger("ckptvcs")
OFF = "off"
AUTO = "auto"
_HINT = "edit the file, or run 'ckpt verify --repair'"
_HEADING = "# Settings of this repository; docs/cli.md describes them.\n"


@dataclass(frozen=True)
class Config:
    """The settings; docs/reference/settings.md describes each.

    Bounds are a number, `off`, or `auto`: the codec's own.
    """

    codec: str = "near"
    keep_exact: int = 2
    keep_best: str = ""
    best_fidelity: str = "exact"
    tag_fidelity: str = "exact"
    pin_fidelity: str = "exact"
    max_weight_error: str | float = AUTO
    max_update_nmse: str | float = AUTO
    keyframe_depth: int = 64
    keyframe_bytes: float = 16.0

    @property
    def exact_rule(self) -> ExactRule:
        """Whose exact patches stay."""
        best = Best.parse(self.keep_best) if self.keep_best else None
        return ExactRule(
            self.keep_exact, best, self.best_fidelity, self.tag_fidelity, self.pin_fidelity
        )

    def codec_of(self, text: str | None) -> CodecSpec:
        """A codec, by default the one of the settings, with the bounds of the settings."""
        spec = parse_codec(self.codec if text is None else text)
        bounds = (
            {OFF: float("inf"), AUTO: None}[value] if isinstance(value, str) else value
            for value in (self.max_weight_error, self.max_update_nmse)
        )
        return with_bounds(spec, *bounds)


def _codec(value: Value) -> str:
    parse_codec(str(value))
    return str(value)


def _best(value: Value) -> str:
    if value != "":
        Best.parse(str(value))
    return str(value)


def _fidelity(value: Value) -> str:
    if value not in FIDELITIES:
        raise InvalidInputError(f"invalid value '{value}', expected one of {', '.join(FIDELITIES)}")
    return str(value)


def _whole(least: int) -> Callable[[Value], int]:
    def check(value: Value) -> int:
        try:
            number = int(value) if not isinstance(value, float) else -1
        except ValueError:
            number = -1
        if isinstance(value, bool) or not least <= number <= _ALL:
            raise InvalidInputError(
                f"invalid value '{value}': must be an integer of at least {least}"
            )
        return number

    return check


def _number(value: Value) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 < number <= _LARGEST:
        raise InvalidInputError(f"invalid value '{value}': must be > 0 and <= {_LARGEST:.0e}")
    return number


def _bound(value: Value) -> str | float:
    return str(value) if value in (OFF, AUTO) else _number(value)


_CHECKS: dict[str, Callable[[Value], Value]] = {
    "codec": _codec,
    "keep-exact": _whole(0),
    "keep-best": _best,
    "best-fidelity": _fidelity,
    "tag-fidelity": _fidelity,
    "pin-fidelity": _fidelity,
    "max-weight-error": _bound,
    "max-update-nmse": _bound,
    "keyframe-depth": _whole(1),
    "keyframe-bytes": _number,
}

KEYS = tuple(_CHECKS)
"""The names of the settings, as the file and the command line have them."""


def _field(key: str) -> str:
    return key.replace("-", "_")


def _checked(key: str, value: object) -> Value:
    if key not in _CHECKS:
        raise InvalidInputError(f"unknown setting '{key}'", hint=f"use one of {', '.join(KEYS)}")
    if not isinstance(value, str | int | float):
        raise InvalidInputError(f"'{key}' is neither text nor a number")
    try:
        return _CHECKS[key](value)
    except InvalidInputError as error:
        raise InvalidInputError(f"'{key}': {error.message}", hint=error.hint) from error


def get_setting(config: Config, key: str) -> Value:
    """The value of a setting.  Raises InvalidInputError: there is none of that name."""
    if key not in _CHECKS:
        _checked(key, "")
    return getattr(config, _field(key))  # type: ignore[no-any-return]


def default_text(codec: str | None = None) -> str:
    """The settings of a new repository, as text.  Raises InvalidInputError: no such codec."""
    name = _codec(Config.codec if codec is None else codec)
    return f"{_HEADING}codec = {json.dumps(name)}\n"


def load_config(path: Path) -> Config:
    """Read the settings; what the file does not say has its default.

    Raises:
        InvalidInputError: the file is missing, is not TOML, or holds an unknown key or a bad value.
            What defaults would let go may have been told to stay.
    """
    return _parse(_read(path), path)


class Settings:
    """The settings of an open repository, as they are at each moment.

    A process may train for weeks: the file is a few lines, and is read whenever it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[str, Config] | None = None  # the last text that could be read
        self._told: str | None = None

    def now(self) -> Config:
        """The settings as the file says them now.

        Raises:
            InvalidInputError: the file cannot be read; see `load_config`.
        """
        text, known = _read(self._path), self._known
        if known is None or known[0] != text:
            known = self._known = text, _parse(text, self._path)
        self._told = None
        return known[1]

    def for_commit(self) -> Config:
        """The same for a commit.  Where the file can no longer be read, a commit uses what this
        process read last, and keeps every exact form: the new text may tell more of them to stay.

        Raises:
            InvalidInputError: this process has never been able to read the file.
        """
        try:
            return self.now()
        except InvalidInputError as error:
            if self._known is None:
                raise
            if self._told != error.message:
                self._told = error.message
                _log.warning(
                    "%s; commits use the settings before that, and keep every exact form",
                    error.message,
                )
            return replace(self._known[1], keep_exact=_ALL)


def _read(path: Path) -> str:
    try:
        text = disk.read_small(path, _MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}", hint=_HINT) from error
    if not text.strip():
        raise InvalidInputError(f"{path} is empty", hint=_HINT)
    return text


def _parse(text: str, path: Path) -> Config:
    try:
        values: dict[str, Any] = tomllib.loads(text)
        settings = {_field(key): _checked(key, value) for key, value in values.items()}
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.message}", hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}", hint=_HINT) from error
    return replace(Config(), **settings)  # type: ignore[arg-type]  # checked one by one


def set_setting(path: Path, backend: Backend, key: str, value: str | None) -> Config:
    """Change a setting in the file, whole or not at all, leaving its other lines as they are; None
    takes it out.  The settings from then on.

    Raises:
        InvalidInputError: there is no such setting, or it does not take that value.
        BusyError: others are changing the repository, and do not end.
        StorageError: the file cannot be written.
    """
    get_setting(Config(), key)
    checked = None if value is None else _checked(key, value)
    own = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    with turn(backend):  # two processes may change settings at once
        there = _read(path) if path.exists() else _HEADING
        lines = [line for line in there.splitlines() if not own.match(line)]
        if checked is not None:
            lines.append(f"{key} = {json.dumps(checked)}")
        text = "\n".join(lines) + "\n"
        config = _parse(text, path)
        disk.replace(path, text.encode(), path.parent / "tmp")
    return config


def mend_settings(path: Path, backend: Backend, copy: Path | None, *, drop: bool) -> bool:
    """Where the settings cannot be read, take those of a copy, or, if told to `drop`, the lines of
    them that can be read; whether that was done.

    Raises:
        StorageError: the file cannot be written.
    """
    with contextlib.suppress(InvalidInputError):
        load_config(path)
        return False
    text: str | None = None
    if copy is not None:
        with contextlib.suppress(InvalidInputError):
            load_config(copy)
            text = _read(copy)
    if text is None and drop:
        text = f"{_HEADING}"
        for line in _lines(path):
            if line.strip() and _can_be_read(f"{text}{line}\n", path):
                text += f"{line}\n"
    if text is None:
        return False
    backend.delete(path.name)  # which may be no file
    disk.replace(path, text.encode(), path.parent / "tmp")
    return True


def _lines(path: Path) -> list[str]:
    try:
        data = disk.read_small(path, _MAX_BYTES)
    except (OSError, ValueError):
        return []
    return data.decode("utf-8", "replace").removeprefix(_HEADING).splitlines()


def _can_be_read(text: str, path: Path) -> bool:
    try:
        _parse(text, path)
    except InvalidInputError:
        return False
    return True


assert {field.name for field in fields(Config)} == {_field(key) for key in KEYS}
