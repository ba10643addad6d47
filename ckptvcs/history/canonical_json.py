"""Canonical JSON: the bytes that ids are made of (docs/format.md, "Canonical JSON")."""

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


def load(data: bytes, what: str) -> dict[str, Json]:
    """Read a JSON object.  Raises CorruptionError, naming `what`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{what} is not readable: {error}") from error
    if not isinstance(value, dict):
        raise CorruptionError(f"{what} is not a record")
    return value


def seal(fields: Mapping[str, Json]) -> bytes:
    """Return the canonical bytes of a record with a `check`: no other hash covers it."""
    return dump({**fields, CHECK: _check(fields)})


def unseal(data: bytes, what: str, old: Set[str]) -> dict[str, Json]:
    """Return the fields of a sealed record; those of older programs are all `old`, without a check.

    Raises:
        CorruptionError: the hash does not match.
    """
    fields = load(data, what)
    given = fields.pop(CHECK, None)
    try:
        right = given == _check(fields) and dump({**fields, CHECK: given}) == data
    except ValueError:  # a number that is not finite is never written
        right = False
    if not right and not (given is None and fields.keys() <= old):
        raise CorruptionError(f"{what} is damaged: its hash does not match")
    return fields


def _check(fields: Mapping[str, Json]) -> str:
    return hex_hash(dump(fields), 16)


def now() -> str:
    """Return the current time in the form of commits, refs and records."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
