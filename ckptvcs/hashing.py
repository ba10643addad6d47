"""BLAKE3, which names and verifies all content.  No other module imports blake3."""

from __future__ import annotations

from blake3 import blake3

from ckptvcs.parallel import may_hash_in_threads

Hasher = blake3


def hasher(*, threads: bool = False) -> Hasher:
    """Return an empty hash object; with `threads`, it uses all cores for long inputs."""
    return Hasher(max_threads=Hasher.AUTO if threads and may_hash_in_threads() else 1)


def hash_of(data: bytes | bytearray | memoryview, length: int = 32) -> bytes:
    """Return the hash of `data`, `length` bytes long."""
    return Hasher(data).digest(length)


def hex_hash(data: bytes | bytearray | memoryview, length: int = 32) -> str:
    """Return the hash of `data` as 2 * `length` hex digits."""
    return Hasher(data).hexdigest(length)
