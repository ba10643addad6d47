"""The tensors of a commit, with their forms and errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptvcs.checkpoint.forms import near_errors, near_tensors
from ckptvcs.history.commit import INEXACT, ErrorReport
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import name_test


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
        aliases: Other names of the tensor, if the checkpoint saves it more than once.
        form: `exact`, `near` or `dropped`.
        exact_lasts: Whether the tensor is exact and stays so: no exact patch of it will be deleted.
    """

    name: str
    part: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    evidence: str
    error: ErrorReport | None
    aliases: tuple[str, ...] = ()
    form: str = "exact"
    exact_lasts: bool = True

    @property
    def relative_error(self) -> float | None:
        """The relative error of the values that a checkout restores; None if it is not known."""
        if self.form == "exact":
            return 0.0
        if self.form == "dropped" or self.error is None:
            return None
        # The report of a moment has only a squared error.
        return self.error.weight_rel or math.sqrt(self.error.residual_nmse)


def tensors(
    repository: Repository,
    name: ObjectId,
    pattern: str | None = None,
    part: str | None = None,
    *,
    small: bool = False,
) -> list[TensorEntry]:
    """Return the tensors of a commit, in the order of its files; see `Repo.tensors`."""
    catalog = repository.catalog
    infos = catalog.schema(catalog.commit(name).schema).tensors
    entry = repository.entry(name)
    fidelity = entry.fidelity
    near, errors = near_tensors(catalog, name, fidelity), near_errors(catalog, name)
    passing = set() if entry.exact_lasts else near_tensors(catalog, name, _patched(entry))
    wants = name_test(pattern)
    found = []
    for number, info in enumerate(infos):
        aliases = tuple(view.name for view in info.views if view.name != info.name)
        if (
            (small or not info.inline)
            and part in (None, info.part)
            and any(map(wants, (info.name, *aliases)))
        ):
            form = "exact" if info.inline else fidelity.get(info.part, "exact")
            form = "exact" if form in INEXACT and number not in near else form
            found.append(
                TensorEntry(
                    info.name,
                    info.part,
                    info.role,
                    info.dtype,
                    info.shape,
                    info.size_bytes,
                    info.evidence,
                    errors.get(number),
                    aliases,
                    form,
                    form == "exact" and number not in passing,
                )
            )
    return found


def _patched(entry: LogEntry) -> dict[str, str]:
    """Return the parts that are exact only by an exact patch, as if they were near."""
    parts = entry.commit.parts.items()
    exact = {part for part, form in entry.fidelity.items() if form == "exact"}
    return {part: "near" for part, state in parts if part in exact and state.exact is not None}


def forms(repository: Repository, name: ObjectId) -> list[str]:
    """Return the form of each of `tensors`: `exact`, `near`, `archived` or `dropped`."""
    return [entry.form for entry in tensors(repository, name)]
