"""Canonical JSON: the bytes that ids are made of (docs/format.md, "Canonical JSON").

Reading checks every field, because a repository may come from someone else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from datetime import UTC, datetime
from typing import Any

from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hex_hash

CHECK = "check"
"""The field of a record that holds the hash of all others."""

Json = Any
"""None, bool, int, float, str, or lists and string-keyed dicts of these."""


def dump(value: Json) -> bytes:
    """One line of ASCII JSON: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def load(data: bytes, what: str) -> Record:
    """Read a JSON object.  Raises CorruptionError, naming `what`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{what} is not readable: {error}") from error
    return Record(value, what)


def seal(fields: Mapping[str, Json]) -> bytes:
    """Return the canonical bytes of a record with a `check`: no other hash covers it."""
    return dump({**fields, CHECK: _check(fields)})


def unseal(data: bytes, what: str, old: Set[str]) -> Record:
    """Parse a sealed record; records of older programs have only `old` fields and no check.

    Raises:
        CorruptionError: the hash does not match.
    """
    record = load(data, what)
    fields = record.fields()
    given = fields.pop(CHECK, None)
    try:
        right = given == _check(fields) and dump({**fields, CHECK: given}) == data
    except ValueError:  # a number that is not finite is never written
        right = False
    if not right and not (given is None and fields.keys() <= old):
        raise CorruptionError(f"{what} is damaged: its hash does not match")
    return record


def _check(fields: Mapping[str, Json]) -> str:
    return hex_hash(dump(fields), 16)


class Record:
    """A JSON object whose fields are checked as they are read."""

    def __init__(self, value: Json, what: str) -> None:
        if not isinstance(value, dict):
            raise CorruptionError(f"{what} is not a record")
        self._value: dict[str, Json] = value
        self._what = what

    def _wrong(self, field: str) -> CorruptionError:
        return CorruptionError(f"{self._what} has no valid '{field}'")

    def checked(self, kinds: Mapping[str, type]) -> dict[str, Json]:
        """Return the fields after checking that those of `kinds` have exactly these types.

        Integers must be from 0 to 2^63 - 1.  Faster than single checks: the log reads thousands.
        """
        for field, kind in kinds.items():
            value: Json = self._value.get(field)
            right = type(value) is kind
            if not right or (kind is int and not 0 <= value < 1 << 63):
                raise self._wrong(field)
        return self._value

    def fields(self) -> dict[str, Json]:
        """Return an unchecked copy of all fields."""
        return dict(self._value)

    def pairs(self, field: str) -> tuple[tuple[str, int], ...]:
        """Return a list of (name, integer) pairs."""
        rows: Json = self._value.get(field)
        if not isinstance(rows, list):
            raise self._wrong(field)
        for row in rows:
            if not isinstance(row, list) or [type(value) for value in row] != [str, int]:
                raise self._wrong(field)
        return tuple((name, number) for name, number in rows)

    def text(self, field: str) -> str:
        value = self._value.get(field)
        if not isinstance(value, str):
            raise self._wrong(field)
        return value

    def optional_text(self, field: str) -> str | None:
        return None if self._value.get(field) is None else self.text(field)

    def integer(self, field: str) -> int:
        """Return an integer from 0 to 2^63 - 1."""
        value = self._value.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise self._wrong(field)
        return value

    def optional_integer(self, field: str) -> int | None:
        return None if self._value.get(field) is None else self.integer(field)

    def signed(self, field: str) -> int:
        value = self._value.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 63:
            raise self._wrong(field)
        return value

    def flag(self, field: str) -> bool:
        value = self._value.get(field, False)
        if not isinstance(value, bool):
            raise self._wrong(field)
        return value

    def items(self, field: str) -> list[Json]:
        value = self._value.get(field)
        if not isinstance(value, list):
            raise self._wrong(field)
        return value

    def texts(self, field: str) -> list[str]:
        values = self.items(field)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(field)
        return values

    def integers(self, field: str) -> list[int]:
        """Return a list of integers from 0 to 2^63 - 1."""
        values = self.items(field)
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
                raise self._wrong(field)
        return values

    def records(self, field: str) -> list[Record]:
        return [Record(value, f"{self._what} ({field})") for value in self.items(field)]

    def mapping(self, field: str) -> dict[str, Json]:
        value = self._value.get(field)
        if not isinstance(value, dict):
            raise self._wrong(field)
        return value

    def record(self, field: str) -> Record:
        return Record(self.mapping(field), f"{self._what} ({field})")

    def has(self, field: str) -> bool:
        return self._value.get(field) is not None


def now() -> str:
    """Return the current time in the form of commits, refs and records."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def to_number(value: Json) -> float:
    """Undo `from_number`.  Raises CorruptionError."""
    if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63):
        return value
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    kind = type(value).__name__  # the value may be too large to show
    raise CorruptionError(f"a record has a {kind} instead of a number")
