"""diff."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Count, JsonOption, Part, open_repo, split_range
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo
from ckptvcs.text import from_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Comparison, Indistinct, Sums, TensorDifference, TensorInfo

DEFAULT_ROWS = 30
_WIDE = 110  # columns of a terminal that has room for every number


def diff(
    context: typer.Context,
    a: Annotated[
        str | None, typer.Argument(metavar="[A]", help="first commit, or A..B (default: HEAD~1)")
    ] = None,
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="second commit (default: HEAD)")
    ] = None,
    count: Count = None,
    only: Part = None,
    sort: Annotated[
        str,
        typer.Option(metavar="KEY", help="sort key: relative, name, cosine, max_abs, changed ..."),
    ] = "relative",
    json: JsonOption = False,
) -> None:
    """Compare the tensors of two commits."""
    first, second = _sides(a, b)
    repo = open_repo(context)
    total = sum(_tensor_bytes(repo, revision, only) for revision in (first, second))
    with render.progress("comparing", total) as tick:
        found = repo.diff(first, second, only=only, progress=tick)
    tensors = found.ordered(sort)
    limit = count
    if limit is None and not json and render.is_terminal():
        limit = DEFAULT_ROWS
    if json:
        render.as_json(_diff_json(found, tensors[:limit]))
        return
    _show_diff(found, tensors[:limit])
    if limit is not None and len(tensors) > limit and count is None:
        render.talk(f"{limit} of {len(tensors)} tensors; use -n N to show more")


def _sides(a: str | None, b: str | None) -> tuple[str, str]:
    """Return the revisions to compare, given `A B` or `A..B`."""
    if a is None or ".." not in a:
        return a or "HEAD~1", b or "HEAD"
    if b is not None:
        raise InvalidInputError(f"'{a}' names both commits", hint="pass A..B alone, or A and B")
    first, last = split_range(a)
    return first or "HEAD", last or "HEAD"


def _tensor_bytes(repo: Repo, revision: str, only: str | None) -> int:
    return sum(one.size_bytes for one in repo.tensors(revision) if only in (None, one.part))


def _number(value: float | None) -> Any:
    return None if value is None else from_number(value)


def _sums_json(found: Comparison, sums: Sums, changed: int | None) -> dict[str, Any]:
    numbers = {
        name: from_number(getattr(sums, name))
        for name in ("norm_a", "norm_b", "norm_difference", "relative", "cosine", "max_abs")
    }
    counts = {name: getattr(sums, name) for name in ("entries", "nonfinite_a", "nonfinite_b")}
    ratio = _number(found.update_ratio(sums))
    return {**numbers, "update_ratio": ratio, "changed": changed, **counts}


def _info_json(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "part": info.part,
        "role": info.role,
        "dtype": info.dtype,
        "shape": list(info.shape),
    }


def _diff_json(found: Comparison, tensors: list[TensorDifference]) -> dict[str, Any]:
    return {
        "a": render.entry_json(found.a),
        "b": render.entry_json(found.b),
        "steps": found.steps,
        "metadata": [
            {"name": name, "a": _plain(a), "b": _plain(b)} for name, a, b in found.metadata
        ],
        "total": (
            _sums_json(found, found.total, found.total_changed) if found.total.entries else None
        ),
        "tensors": [
            _info_json(tensor.info)
            | _sums_json(found, tensor.sums, tensor.changed)
            | {
                "error_a": _number(tensor.error_a),
                "error_b": _number(tensor.error_b),
                "near_a": tensor.near_a,
                "near_b": tensor.near_b,
                "below_error": tensor.below_error,
            }
            for tensor in tensors
        ],
        "added": [_info_json(info) for info in found.added],
        "removed": [_info_json(info) for info in found.removed],
        "reshaped": [{"a": _info_json(a), "b": _info_json(b)} for a, b in found.reshaped],
        "unchanged": [_info_json(info) for info in found.unchanged],
        "indistinguishable": [
            _info_json(one.info)
            | {"near_a": one.near_a, "near_b": one.near_b, "differs": one.differs or None}
            for one in found.indistinguishable
        ],
        "dropped": list(found.dropped),
    }


def _plain(value: object) -> Any:
    return from_number(value) if isinstance(value, float) else value


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else render.printable(str(value))


def _sums_row(
    name: str, found: Comparison, sums: Sums, changed: int | None, mark: str
) -> list[str]:
    ratio = found.update_ratio(sums)
    broken = f"{sums.nonfinite_a} -> {sums.nonfinite_b}"
    return [
        name,
        f"{sums.norm_a:.3g}",
        f"{sums.norm_b:.3g}",
        f"{sums.norm_difference:.3g}",
        f"{mark}{sums.relative:.3g}",
        "-" if ratio is None else f"{ratio:.3g}",
        f"{sums.cosine:.5f}",
        f"{sums.max_abs:.3g}",
        "-" if changed is None else f"{100 * changed / max(1, sums.entries):.3g}%",
        broken if sums.nonfinite_a or sums.nonfinite_b else "",
    ]


_HEADING = ["name", *render.DISTANCES]


def _show_diff(comparison: Comparison, tensors: list[TensorDifference]) -> None:
    for side, entry in (("A", comparison.a), ("B", comparison.b)):
        step = "" if entry.step is None else f" step {entry.step},"
        render.data(f"{side} {entry.id[:8]}:{step} {render.fidelity(entry)}")
    _show_metadata(comparison)
    if tensors:
        _show_tensors(comparison, tensors)
    for word, infos in (("added", comparison.added), ("removed", comparison.removed)):
        for info in infos:
            render.data(f"{word}: {_described(info)}")
    for a, b in comparison.reshaped:
        render.data(f"reshaped: {_described(a)} -> {b.dtype} {list(b.shape)}")
    for part in comparison.dropped:
        render.data(f"{part}: not compared: a rule dropped it from one of the commits")
    count = len(comparison.unchanged)
    if count:
        render.data(f"{count} tensor{'s are' if count > 1 else ' is'} the same on both sides")
    if comparison.indistinguishable:
        render.data(describe_indistinct(comparison.indistinguishable))


def _show_metadata(comparison: Comparison) -> None:
    for name, a, b in comparison.metadata:
        if name.endswith("_bytes") and isinstance(a, int) and isinstance(b, int):
            part = name.removesuffix("_bytes")
            render.data(f"  {part} size: {render.size(a)} -> {render.size(b)}")
        elif name != "step":
            render.data(f"  {render.printable(name)}: {_text(a)} -> {_text(b)}")


def _show_tensors(comparison: Comparison, tensors: list[TensorDifference]) -> None:
    rows = [_HEADING]
    for tensor in tensors:
        mark = "~" if tensor.below_error else ""
        name = render.printable(tensor.info.name)
        rows.append(_sums_row(name, comparison, tensor.sums, tensor.changed, mark))
    total = comparison.total
    if total.entries:
        name = "all changed weights"
        rows.append(_sums_row(name, comparison, total, comparison.total_changed, ""))
    hidden = set() if any(row[-1] for row in rows[1:]) else {"not finite"}
    if render.width() < _WIDE:
        hidden |= {"|B|", "|B-A|"}
    shown = [column for column, name in enumerate(_HEADING) if name not in hidden]
    render.data("")
    render.table([[row[column] for column in shown] for row in rows])
    if any(tensor.below_error for tensor in tensors):
        render.data("~ change is not above the error of the near forms")


def describe_indistinct(found: Sequence[Indistinct]) -> str:
    """Say how many tensors cannot be compared, and why."""
    both = all(one.near_a and one.near_b for one in found)
    where = "both sides" if both else "one side or both"
    said = f"{_tensors(len(found))} cannot be told apart (near on {where})"
    differ = sum(one.differs for one in found)
    return said + (f"; the originals of {_tensors(differ)} differ" if differ else "")


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


def _described(info: TensorInfo) -> str:
    return f"{render.printable(info.name)} {info.dtype} {list(info.shape)}"
