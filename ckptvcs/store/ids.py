"""Objects: immutable bytes with a kind, named by BLAKE3 of both (docs/format.md, "Object")."""

from __future__ import annotations

import re
from enum import IntEnum
from typing import NewType

from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hex_hash

ObjectId = NewType("ObjectId", str)
"""64 lower-case hex digits."""

PackId = NewType("PackId", str)
"""BLAKE3 of a pack file's bytes, 64 lower-case hex digits."""

_HEX = re.compile(r"[0-9a-f]{64}\Z")

MAX_OBJECT_BYTES = 1 << 28
"""Limit of a decoded object (not of a bundle's region), checked before memory is allocated."""


class Kind(IntEnum):
    """The kind of an object; pack records contain the number."""

    COMMIT = 1
    SCHEMA = 2
    VALUES = 3
    SKELETON = 4
    RECIPE = 5
    RECORD = 6
    BUNDLE = 7
    ERRORS = 8
    NOTE = 9
    PROVENANCE = 10


_PREFIXES = {kind: kind.name.lower().encode() + b"\0" for kind in Kind}


def object_id(kind: Kind, content: bytes) -> ObjectId:
    """Return the id of an object."""
    return ObjectId(hex_hash(_PREFIXES[kind] + content))


def checked_id(text: object) -> ObjectId:
    """Return untrusted `text` as an id.

    Raises:
        CorruptionError: `text` is not a valid id.
    """
    if not isinstance(text, str) or not _HEX.match(text):
        raise CorruptionError("an object contains an invalid object id")
    return ObjectId(text)
