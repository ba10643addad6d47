"""What is there of a repository, whatever was refused: in a process where nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo

_SCRATCH = ("tmp", "leases", "marks")


def commits(root: str) -> dict[str, Any]:
    """The commits by their ids, with what each gives, the refs, and what is damaged."""
    repo = Repo.open(Path(root) / "repo")
    found = {}
    for name, commit in handle(repo).revisions.visible().items():
        exact = repo.entry(name).exact
        found[name] = {
            "step": commit.step,
            "message": commit.message,
            "near": _digest(handle(repo).restorer(name, near=True)),
            "exact": _digest(handle(repo).restorer(name)) if exact else None,
        }
    damage = [one.message for one in repo.verify().damage]
    return {"commits": found, "refs": dict(handle(repo).revisions.tips()), "damage": damage}


def _digest(restorer: Restorer) -> str:
    return " ".join(map(restorer.digest, restorer.commit.files))


def swept(root: str) -> dict[str, Any]:
    """The same after gc, and what that left in folders for what is on its way."""
    repo = Repo.open(Path(root) / "repo")
    repo.gc()
    left = [
        str(path.relative_to(repo.folder))
        for folder in _SCRATCH
        for path in (repo.folder / folder).glob("*")
    ]
    return commits(root) | {"left": left}
