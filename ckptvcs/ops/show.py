"""One commit in full: its tensors, and how the files in the working directory differ from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptvcs.history.commit import ErrorReport
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor of a commit.  `evidence` says how its role is known, `error` how far its near
    form is off (None where it is exact).
    """

    name: str
    part: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    evidence: str
    error: ErrorReport | None


@dataclass(frozen=True)
class Status:
    """Where HEAD is, and how the checked-out files differ from it: `missing`, `changed` or `near`
    (written by a checkout of a near commit), each with its path.
    """

    branch: str | None
    head: ObjectId | None
    step: int | None
    changes: tuple[tuple[str, Path], ...]


def tensors(repository: Repository, name: ObjectId) -> list[TensorEntry]:
    """Return the stored tensors of a commit, in the order of its files."""
    catalog = repository.catalog
    errors = catalog.errors(name)
    return [
        TensorEntry(
            info.name,
            info.part,
            info.role,
            info.dtype,
            info.shape,
            info.size_bytes,
            info.evidence,
            errors.get(number),
        )
        for number, info in enumerate(catalog.schema(catalog.commit(name).schema).tensors)
        if not info.inline
    ]


def forms(repository: Repository, name: ObjectId) -> list[str]:
    """Return for each of `tensors` how it comes back: `exact`, `near` or `dropped`."""
    reader = repository.restorer(name)
    near = reader.near()
    return [
        "near" if number in near else reader.fidelity[info.part].replace("near", "exact")
        for number, info in enumerate(reader.schema.tensors)
        if not info.inline
    ]


def status(repository: Repository) -> Status:
    """Compare the working directory with HEAD."""
    from ckptvcs.ops.checkout import worktree  # noqa: PLC0415  needs numpy

    head, name = repository.head(), repository.revisions.head()
    branch = head.branch if head else None
    if name is None:
        return Status(branch, None, None, ())
    changes = worktree(repository).changes(repository.restorer(name))
    return Status(branch, name, repository.catalog.commit(name).step, tuple(changes))
