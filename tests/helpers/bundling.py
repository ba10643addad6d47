"""Bundle files: short histories to make them of, and forged ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from ckptvcs.repo import Repo
from tests.helpers.crashing import states

Manifest = dict[str, Any]
_TRAILER = struct.Struct("<QQ32s8s")


def history(root: Path, steps: int = 5, codec: str = "near", first: int = 1) -> Repo:
    """A repository with a commit of each step from `first` to `steps`."""
    repo = Repo.init(root, codec=codec)
    for state in states(steps)[first - 1 :]:
        repo.commit(state, step=state["step"], metrics={"loss": 1 / state["step"]})
    return repo


def steps(repo: Repo) -> list[int | None]:
    """The steps of the log, oldest first."""
    return [entry.step for entry in repo.log()][::-1]


def sealed(packs: bytes, manifest: bytes) -> bytes:
    """A bundle file of these bytes, with the right hash."""
    head = struct.pack("<8sHHI", b"CKPTARCH", 1, 0, 0)
    body = head + packs + manifest
    return body + _TRAILER.pack(
        len(head) + len(packs), len(manifest), blake3(body).digest(), b"CKPTAEND"
    )


def opened(data: bytes) -> tuple[bytes, Manifest]:
    """The packs of a bundle file, and its manifest."""
    start, length, _, _ = _TRAILER.unpack(data[-_TRAILER.size :])
    return data[16:start], json.loads(data[start : start + length])


def forged(path: Path, change: Callable[[Manifest], object]) -> Path:
    """A copy of a bundle file with another manifest, and the right hash."""
    packs, manifest = opened(path.read_bytes())
    change(manifest)
    target = path.with_name("forged.ckptz")
    target.write_bytes(sealed(packs, json.dumps(manifest).encode()))
    return target
