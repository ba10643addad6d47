"""The settings of a repository: their names, their values, and the files that hold them.

A setting that the file of the repository does not name has the value of the user's file, otherwise
its default.  docs/reference/settings.md describes each setting.  Lower layers get values, never the
files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ckptvcs.codec.spec import REMOVED, CodecSpec, parse_codec, with_bounds
from ckptvcs.errors import InvalidInputError
from ckptvcs.gc.retention import FIDELITIES, Best, ExactRule
from ckptvcs.store import disk
from ckptvcs.store.backend import Backend
from ckptvcs.store.leases import turn
from ckptvcs.text import seconds

Value = str | int | float

_LARGEST = 1e9
_MAX_BYTES = 1 << 16
_ALL = (1 << 31) - 1
_log = logging.getLogger("ckptvcs")
OFF = "off"
AUTO = "auto"
_HINT = "edit the file, or run 'ckpt verify --repair'"
_HEADING = "# Settings of this repository; docs/reference/settings.md describes them.\n"
_USER_HEADING = "# Settings of all repositories that do not have their own.\n"


def _codec(value: Value) -> str:
    """Check a codec; that of an old repository may be one that only a commit refuses."""
    if str(value).partition(":")[0] not in REMOVED:
        parse_codec(str(value))
    return str(value)


def _best(value: Value) -> str:
    if value != "":
        Best.parse(str(value))
    return str(value)


def _integer(value: Value, *, least: int = 0) -> int:
    try:
        number = -1 if isinstance(value, bool | float) else int(value)
    except ValueError:
        number = -1
    if not least <= number <= _ALL:
        raise InvalidInputError(f"invalid value '{value}': must be an integer of at least {least}")
    return number


def _number(value: Value) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 < number <= _LARGEST:
        raise InvalidInputError(f"invalid value '{value}': must be > 0 and <= {_LARGEST:.0e}")
    return number


def _columns(value: Value) -> str:
    if not str(value).replace(",", " ").strip():
        raise InvalidInputError("no metric is named", hint="write loss,eval_loss or auto")
    return str(value)


def _time(value: Value) -> str:
    if seconds(str(value)) is None:
        raise InvalidInputError(f"invalid time '{value}'", hint="write 12h, 7d, 4w, or 0s for none")
    return str(value)


def _bound(value: Value) -> str | float:
    return str(value) if value in (OFF, AUTO) else _number(value)


def _auto_or_number(value: Value) -> str | float:
    return AUTO if value == AUTO else _number(value)


def _one_of(*names: str) -> Callable[[Value], Value]:
    def parse(value: Value) -> Value:
        if value not in names:
            raise InvalidInputError(f"invalid value '{value}', expected one of {', '.join(names)}")
        return str(value)

    return parse


def _setting(default: Value, parse: Callable[[Value], Value]) -> Any:
    """Return a field of `Config`; `parse` checks and converts a value of the file or a user."""
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True)
class Config:
    """The settings.  A bound is a number, `off`, or `auto` (the bound of the codec)."""

    codec: str = _setting("near", _codec)
    keep_exact: int = _setting(2, _integer)
    keep_best: str = _setting("", _best)
    best_fidelity: str = _setting("exact", _one_of(*FIDELITIES))
    tag_fidelity: str = _setting("exact", _one_of(*FIDELITIES))
    pin_fidelity: str = _setting("exact", _one_of(*FIDELITIES))
    max_weight_error: str | float = _setting(AUTO, _bound)
    max_lag: str | float = _setting(AUTO, _bound)
    max_update_nmse: str | float = _setting(AUTO, _bound)
    keyframe_depth: int = _setting(64, lambda value: _integer(value, least=1))
    keyframe_bytes: float = _setting(16.0, _number)
    log_columns: str = _setting(AUTO, _columns)
    archive_after: str | int = _setting(OFF, lambda value: OFF if value == OFF else _integer(value))
    archive_every: int = _setting(4, lambda value: _integer(value, least=2))
    archive_lag: str | float = _setting(AUTO, _auto_or_number)
    gc_grace: str = _setting("7d", _time)
    provenance: str = _setting("full", _one_of("full", "no-diff", OFF))
    provenance_argv: str = _setting(OFF, _one_of("on", OFF))

    @property
    def exact_rule(self) -> ExactRule:
        """The rule that says which exact patches to keep."""
        best = Best.parse(self.keep_best) if self.keep_best else None
        return ExactRule(
            self.keep_exact, best, self.best_fidelity, self.tag_fidelity, self.pin_fidelity
        )

    @property
    def grace_seconds(self) -> float:
        """How long gc keeps the data of dropped commits, in seconds."""
        return seconds(self.gc_grace) or 0.0

    def codec_of(self, text: str | None) -> CodecSpec:
        """Return a codec with the configured bounds; None names the configured codec."""
        spec = parse_codec(self.codec if text is None else text)
        names = ("max_weight_error", "max_lag", "max_update_nmse")
        values = {name: getattr(self, name) for name in names}
        bounds = {
            name: {OFF: float("inf"), AUTO: None}[value] if isinstance(value, str) else value
            for name, value in values.items()
        }
        return with_bounds(spec, **bounds)


def _field(key: str) -> str:
    return key.replace("-", "_")


_PARSERS: dict[str, Callable[[Value], Value]] = {
    setting.name.replace("_", "-"): setting.metadata["parse"] for setting in fields(Config)
}

KEYS = tuple(_PARSERS)
"""The names of the settings in the file and on the command line."""


def _checked(key: str, value: object) -> Value:
    _require_key(key)
    if not isinstance(value, str | int | float):
        raise InvalidInputError(f"'{key}' is neither text nor a number")
    try:
        return _PARSERS[key](value)
    except InvalidInputError as error:
        raise InvalidInputError(f"'{key}': {error.message}", hint=error.hint) from error


def _require_key(key: str) -> None:
    if key not in _PARSERS:
        near = get_close_matches(key, KEYS, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else "run 'ckpt config' to list them"
        raise InvalidInputError(f"unknown setting '{key}'", hint=hint)


def get_setting(config: Config, key: str) -> Value:
    """Return the value of a setting.

    Raises:
        InvalidInputError: No setting has this name.
    """
    _require_key(key)
    return getattr(config, _field(key))  # type: ignore[no-any-return]


def default_text(codec: str | None = None) -> str:
    """Return the text of the settings of a new repository; its codec is by default the user's.

    Raises:
        InvalidInputError: No codec has this name, or the user's settings cannot be read.
    """
    name = _codec(replace(Config(), **user_settings()).codec if codec is None else codec)
    return f"{_HEADING}codec = {json.dumps(name)}\n"


def load_config(path: Path) -> Config:
    """Read the settings; a setting that the file does not name has its default.

    Raises:
        InvalidInputError: The file is missing, is not TOML, or holds an unknown key or a bad
            value.  Defaults would be dangerous: they could delete what the real settings keep.
    """
    return _parse(read_text(path), path)


def user_path() -> Path | None:
    """Return the settings file of the user; None if the user has no home directory.

    The environment variable CKPT_CONFIG names another file.
    """
    named = os.environ.get("CKPT_CONFIG")
    if named:
        return Path(named)
    folder = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        folder = folder if folder.is_absolute() else Path.home() / ".config"
    except RuntimeError:
        return None
    return folder / "ckptvcs" / "config.toml"


def user_settings() -> dict[str, Any]:
    """Return the values of the user's file by field; none if there is no such file.

    Raises:
        InvalidInputError: The file cannot be read; see `load_config`.
    """
    path = user_path()
    text = "" if path is None else _read_user(path)
    return {} if path is None else _values(text, path, "edit the file")


def _read_user(path: Path) -> str:
    try:
        return disk.read_small(path, _MAX_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}", hint="edit the file") from error


class Settings:
    """The settings of an open repository.

    A process may train for weeks, so each call reads the files, which have a few lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: Config | None = None  # the last valid ones
        self._warned: str | None = None

    def now(self) -> Config:
        """Return the settings that the file holds now.

        Raises:
            InvalidInputError: The file cannot be read; see `load_config`.
        """
        self._last = replace(Config(), **(user_settings() | self._own()))
        self._warned = None
        return self._last

    def _own(self) -> dict[str, Any]:
        return _values(read_text(self._path), self._path)

    def origins(self) -> dict[str, str]:
        """Return where each setting comes from: `repository`, `user` or `default`.

        Raises:
            InvalidInputError: A file cannot be read; see `load_config`.
        """
        named = {"user": user_settings(), "repository": self._own()}
        found = dict.fromkeys(KEYS, "default")
        for origin, values in named.items():
            found |= {key: origin for key in KEYS if _field(key) in values}
        return found

    def for_commit(self) -> Config:
        """Return the settings for a commit.

        If the file has become unreadable, a commit uses the last valid settings of this process.
        It keeps every exact form, because the unreadable text may keep more of them.

        Raises:
            InvalidInputError: This process never found a readable file.
        """
        try:
            return self.now()
        except InvalidInputError as error:
            if self._last is None:
                raise
            if self._warned != error.message:
                self._warned = error.message
                _log.warning(
                    "%s; commits use the settings before that, and keep every exact form",
                    error.message,
                )
            return replace(self._last, keep_exact=_ALL)


def read_text(path: Path) -> str:
    """Return the text of a settings file."""
    try:
        text = disk.read_small(path, _MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}", hint=_HINT) from error
    if not text.strip():
        raise InvalidInputError(f"{path} is empty", hint=_HINT)
    return text


def _parse(text: str, path: Path) -> Config:
    return replace(Config(), **_values(text, path))


def _values(text: str, path: Path, hint: str = _HINT) -> dict[str, Any]:
    """Return the checked settings of a file, by field."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
        return {_field(key): _checked(key, value) for key, value in values.items()}
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.message}", hint=error.hint) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"cannot read {path}: {error}", hint=hint) from error


def set_setting(path: Path, backend: Backend, key: str, value: str | None) -> Config:
    """Change one setting in the file atomically, and return the new settings.

    The other lines of the file stay.  None removes the setting.

    Raises:
        InvalidInputError: No setting has this name, or the value is not valid.
        BusyError: Other processes keep changing the repository.
        StorageError: The file cannot be written.
    """
    _require_key(key)
    checked = None if value is None else _checked(key, value)
    with turn(backend):  # two processes may change settings at once
        text = read_text(path) if path.exists() else _HEADING
        text = _with_setting(text, key, checked)
        config = _parse(text, path)
        disk.replace(path, text.encode(), path.parent / "tmp")
    return config


def set_user_setting(key: str, value: str | None) -> None:
    """Change one setting in the user's file atomically; None removes it.

    Raises:
        InvalidInputError: No setting has this name, the value is not valid, the file cannot be
            read, or the user has no home directory.
        StorageError: The file cannot be written.
    """
    _require_key(key)
    checked, path = None if value is None else _checked(key, value), user_path()
    if path is None:
        raise InvalidInputError("no home directory", hint="name a file in CKPT_CONFIG")
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is not a file", hint="name a file in CKPT_CONFIG")
    text = _with_setting(_read_user(path) or _USER_HEADING, key, checked)
    _values(text, path, "edit the file")
    path = disk.real_path(path)  # the user may keep settings elsewhere
    disk.replace(path, text.encode(), path.parent)


def _with_setting(text: str, key: str, value: Value | None) -> str:
    """Return the text of a file with another value of a setting; None removes the setting."""
    assignment = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    lines = [line for line in text.splitlines() if not assignment.match(line)]
    if value is not None:
        lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def repair_settings(path: Path, backend: Backend, copy: Path | None, *, drop: bool) -> bool:
    """Replace unreadable settings, and return whether that was done.

    The new settings are those of `copy`, or with `drop` the readable lines of the file.

    Raises:
        StorageError: The file cannot be written.
    """
    if _is_readable(path):
        return False
    if copy is not None and _is_readable(copy):
        text = read_text(copy)
    elif drop:
        text = _readable_lines(path) or _HEADING
    else:
        return False
    backend.delete(path.name)  # it may be a folder or a link
    disk.replace(path, text.encode(), path.parent / "tmp")
    return True


def _is_readable(path: Path) -> bool:
    with contextlib.suppress(InvalidInputError):
        load_config(path)
        return True
    return False


def _readable_lines(path: Path) -> str:
    text = ""
    with contextlib.suppress(OSError, ValueError):
        data = disk.read_small(path, _MAX_BYTES)
        for line in filter(str.strip, data.decode("utf-8", "replace").splitlines()):
            with contextlib.suppress(InvalidInputError):
                _parse(f"{text}{line}\n", path)
                text += f"{line}\n"
    return text
