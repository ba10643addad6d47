"""The tensors of a commit, and the differences between HEAD and the files on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptvcs.history.commit import ErrorReport
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor of a commit.

    Attributes:
        name: The full name of the tensor.
        part: `model`, `optimizer` or `rest`.
        role: What the tensor is, such as a weight or an optimizer moment.
        dtype: The element type, such as `BF16`.
        shape: The shape.
        size_bytes: The uncompressed size in bytes.
        evidence: How the role was detected.
        error: The error of the near form; None if the tensor is exact.
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
    """The position of HEAD, and the differences of the files on disk.

    Attributes:
        branch: The branch that HEAD follows; None if HEAD is detached.
        head: The commit of HEAD; None in an empty repository.
        step: The training step of that commit, if known.
        changes: For each differing file `missing`, `changed` or `near`, and its path.
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
    """Return the form of each of `tensors`: `exact`, `near` or `dropped`."""
    reader = repository.restorer(name)
    near = reader.near()
    return [
        "near" if number in near else reader.fidelity[info.part].replace("near", "exact")
        for number, info in enumerate(reader.schema.tensors)
        if not info.inline
    ]


def status(repository: Repository) -> Status:
    """Compare the files on disk with HEAD; see `Repo.status`."""
    from ckptvcs.ops.checkout import WorkTree  # noqa: PLC0415  needs numpy

    head, name = repository.head(), repository.revisions.head()
    branch = head.branch if head else None
    if name is None:
        return Status(branch, None, None, ())
    changes = WorkTree(repository).changes(repository.restorer(name))
    return Status(branch, name, repository.catalog.commit(name).step, tuple(changes))
