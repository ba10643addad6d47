"""BLAKE3, by which everything is named and proven.  No other module imports it."""

from __future__ import annotations

from blake3 import blake3

from ckptvcs.parallel import may_hash_in_threads

Hasher = blake3


def hasher(*, threads: bool = False) -> Hasher:
    """Return a hash to be fed; with `threads` it uses all cores for long pieces."""
    return Hasher(max_threads=Hasher.AUTO if threads and may_hash_in_threads() else 1)


def hash_of(data: bytes | bytearray | memoryview, length: int = 32) -> bytes:
    """Return the hash of some bytes, `length` bytes long."""
    return Hasher(data).digest(length)


def hex_hash(data: bytes | bytearray | memoryview, length: int = 32) -> str:
    """Return the same as text, two digits a byte."""
    return Hasher(data).hexdigest(length)
