"""Which cases of a test the short profile runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def short(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Return all cases as parameters; those that are not `chosen` are slow."""
    rows = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        rows.append(pytest.param(*values, marks=() if case in chosen else pytest.mark.slow))
    return rows
