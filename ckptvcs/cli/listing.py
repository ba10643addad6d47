"""How names are listed, and what a name cannot bring back."""

from __future__ import annotations

from ckptvcs.cli import render
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId


def list_refs(repo: Repo, space: str, *, json: bool, current: str | None) -> None:
    """Print the branches or tags with their commits; `current` is marked."""
    names = repo.refs.names(space)
    read = repo.revisions.tag if space == "tags" else repo.revisions.branch
    found = [(name, commit) for name in names if (commit := read(name)) is not None]
    if json:
        render.as_json([
            {"name": name, "commit": commit, "step": repo.catalog.commit(commit).step,
             "current": name == current}
            for name, commit in found
        ])  # fmt: skip
        return
    for name, commit in found:
        step = repo.catalog.commit(commit).step
        mark = "* " if name == current else "  "
        render.data(f"{mark}{name}  {commit[:8]}" + ("" if step is None else f"  step {step}"))


def warn_if_faded(repo: Repo, commit: ObjectId) -> None:
    """Say what a tag or a pin cannot bring back."""
    entry = repo.entry(commit)
    if not entry.exact:
        render.talk(
            f"note: {commit[:8]} is {render.fidelity(entry)} by now; it cannot become exact again"
        )
