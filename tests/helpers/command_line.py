"""Run `ckpt` as a process or in this process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ckpt = Callable[..., Done]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "CKPT_DIR"}
    return kept | {"PYTHONFAULTHANDLER": "1"}


def check(done: Done, args: tuple[object, ...], code: int | None) -> Done:
    assert "Traceback" not in done.err, done.err
    if code is not None:
        assert done.code == code, (args, done)
    return done


COMMIT_KEYS = {
    "id",
    "step",
    "message",
    "raw_bytes",
    "stored_bytes",
    "patch_bytes",
    "kind",
    "depth",
    "exact",
    "fidelity",
    "error",
}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
