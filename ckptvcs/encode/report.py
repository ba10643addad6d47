"""Sums of errors -> what a commit says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.encode.group import Errors
from ckptvcs.history.commit import ErrorReport
from ckptvcs.history.schema import TensorInfo


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy else 0.0


def _weights(sums: Errors) -> ErrorReport:
    return ErrorReport(
        sqrt(_ratio(sums.error, sums.energy)),
        _ratio(sums.error, sums.residual),
        _ratio(sums.fisher_error, sums.fisher_residual),
        _ratio(sums.update_error, sums.update_energy),
        sums.largest,
    )


def report(errors: Mapping[int, Errors], infos: Sequence[TensorInfo]) -> ErrorReport:
    """The errors of a commit: of its weights together, and of all next steps together."""
    total = Errors()
    for number, sums in errors.items():
        if infos[number].role == WEIGHT:
            total.add(sums)
        total.update_error += sums.update_error
        total.update_energy += sums.update_energy
    return _weights(total)


def report_tensors(
    errors: Mapping[int, Errors], infos: Sequence[TensorInfo]
) -> dict[int, ErrorReport]:
    """The errors of each tensor that is not exact.  A moment's own NMSE stands as
    `residual_nmse`: of exp_avg as it is, of squares by their roots.
    """
    found = {}
    for number, sums in errors.items():
        if sums.error:
            one = _weights(sums)
            if infos[number].role != WEIGHT:
                nmse = _ratio(sums.error, sums.energy)
                one = ErrorReport(0.0, nmse, 0.0, one.update_nmse, one.max_abs)
            found[number] = one
    return found
