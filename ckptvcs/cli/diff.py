"""diff."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import Count, JsonOption, Part, open_repo, split_range
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Comparison, Indistinct, LayerDifference, Sums, TensorDifference, TensorInfo

DEFAULT_ROWS = 30
_WEIGHT = "weight"  # the role that is not shown
_WIDE = 110  # columns of a terminal that has room for every number


_Name = Annotated[
    str | None, Option(metavar="GLOB", help="only tensors that match, or whose names contain this")
]
_Near = Annotated[bool, Option("--near", help="compare A (default: HEAD) with its near form")]


def diff(
    context: Context,
    a: Annotated[
        str | None, Argument(metavar="[A]", help="first commit, or A..B (default: HEAD~1)")
    ] = None,
    b: Annotated[str | None, Argument(metavar="[B]", help="second commit (default: HEAD)")] = None,
    count: Count = None,
    only: Part = None,
    name: _Name = None,
    by: Annotated[
        Literal["tensor", "layer"], Option(metavar="layer", help="sum up the tensors of each layer")
    ] = "tensor",
    near: _Near = False,
    sort: Annotated[
        str, Option(metavar="KEY", help="sort key: relative, name, cosine, max_abs, changed ...")
    ] = "relative",
    json: JsonOption = False,
) -> None:
    """Compare the tensors of two commits."""
    first, second = _near_sides(a, b) if near else _sides(a, b)
    repo = open_repo(context)
    total = sum(_tensor_bytes(repo, revision, name, only) for revision in (first, second))
    with render.progress("comparing", total) as tick:
        if near:
            comparison = repo.diff_near(first, only=only, name=name, progress=tick)
        else:
            comparison = repo.diff(first, second, only=only, name=name, progress=tick)
    rows: list[Any] = comparison.layers(sort) if by == "layer" else comparison.ordered(sort)
    limit = count
    if limit is None and not json and render.is_terminal():
        limit = DEFAULT_ROWS
    if json:
        render.as_json(_diff_json(comparison, rows[:limit], by))
        return
    _show_diff(comparison, rows[:limit])
    if limit is not None and len(rows) > limit and count is None:
        render.talk(f"{limit} of {len(rows)} {by}s; use -n N to show more")


def _sides(a: str | None, b: str | None) -> tuple[str, str]:
    """Return the revisions to compare, given `A B` or `A..B`."""
    if a is None or ".." not in a:
        return a or "HEAD~1", b or "HEAD"
    if b is not None:
        raise InvalidInputError(f"'{a}' names both commits", hint="pass A..B alone, or A and B")
    first, last = split_range(a)
    return first or "HEAD", last or "HEAD"


def _near_sides(a: str | None, b: str | None) -> tuple[str, str]:
    """Return the commit to compare with its near form, twice."""
    if b is not None or ".." in (a or ""):
        raise InvalidInputError(
            "--near compares one commit with its own near form", hint="name one commit"
        )
    return a or "HEAD", a or "HEAD"


def _tensor_bytes(repo: Repo, revision: str, name: str | None, only: str | None) -> int:
    return sum(one.size_bytes for one in repo.tensors(revision, name, only=only, small=True))


def _sums_json(comparison: Comparison, sums: Sums, changed: int | None) -> dict[str, Any]:
    return (
        render.attributes(sums, "norm_a norm_b norm_difference relative cosine max_abs")
        | {"update_ratio": comparison.update_ratio(sums), "changed": changed}
        | render.attributes(sums, "entries nonfinite_a nonfinite_b")
    )


def _info_json(info: TensorInfo) -> dict[str, Any]:
    return render.attributes(info, "name part role dtype shape")


def _layer_json(comparison: Comparison, layer: LayerDifference) -> dict[str, Any]:
    return (
        render.attributes(layer, "name part role")
        | {"tensors": len(layer.tensors)}
        | _sums_json(comparison, layer.sums, layer.changed)
        | render.attributes(layer, "below_error")
    )


def _tensor_json(comparison: Comparison, tensor: TensorDifference) -> dict[str, Any]:
    return (
        _info_json(tensor.info)
        | _sums_json(comparison, tensor.sums, tensor.changed)
        | render.attributes(tensor, "layer error_a error_b near_a near_b below_error")
    )


def _diff_json(comparison: Comparison, rows: list[Any], by: str) -> dict[str, Any]:
    total = comparison.total
    row_json = _layer_json if by == "layer" else _tensor_json
    return {
        "a": entries.entry_json(comparison.a),
        "b": entries.entry_json(comparison.b),
        "steps": comparison.steps,
        "metadata": [{"name": name, "a": a, "b": b} for name, a, b in comparison.metadata],
        "total": (
            _sums_json(comparison, total, comparison.total_changed) if total.entries else None
        ),
        f"{by}s": [row_json(comparison, row) for row in rows],
        "added": list(map(_info_json, comparison.added)),
        "removed": list(map(_info_json, comparison.removed)),
        "reshaped": [{"a": _info_json(a), "b": _info_json(b)} for a, b in comparison.reshaped],
        "unchanged": list(map(_info_json, comparison.unchanged)),
        "indistinguishable": [
            _info_json(tensor.info)
            | render.attributes(tensor, "near_a near_b")
            | {"differs": tensor.differs or None}
            for tensor in comparison.indistinguishable
        ],
        "dropped": comparison.dropped,
    }


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else render.printable(str(value))


def _sums_row(
    name: str, comparison: Comparison, sums: Sums, changed: int | None, mark: str
) -> list[str]:
    ratio = comparison.update_ratio(sums)
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


def _show_diff(comparison: Comparison, rows: list[Any]) -> None:
    for side, entry in (("A", comparison.a), ("B", comparison.b)):
        step = "" if entry.step is None else f" step {entry.step},"
        render.data(f"{side} {entry.id[:8]}:{step} {entries.fidelity(entry)}")
    _show_metadata(comparison)
    if rows:
        _show_rows(comparison, rows)
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


def _row_name(row: Any) -> str:
    """Return the name of a row; the optimizer has several rows for a layer."""
    name, role = render.printable(row.name), getattr(row, "role", _WEIGHT)
    return name if role == _WEIGHT else f"{name} ({role})"


def _show_rows(comparison: Comparison, found: list[Any]) -> None:
    same_commit = comparison.a.id == comparison.b.id  # so that the difference is the error
    rows = [_HEADING]
    for row in found:
        mark = "~" if row.below_error and not same_commit else ""
        rows.append(_sums_row(_row_name(row), comparison, row.sums, row.changed, mark))
    total = comparison.total
    if total.entries:
        name = "all changed weights"
        rows.append(_sums_row(name, comparison, total, comparison.total_changed, ""))
    hidden = _hidden(comparison, rows[1:])
    shown = [column for column, name in enumerate(_HEADING) if name not in hidden]
    render.data("")
    render.table([[row[column] for column in shown] for row in rows])
    if any(row[_HEADING.index("change")].startswith("~") for row in rows):
        render.data("~ change is not above the error of the near forms")


def _hidden(comparison: Comparison, rows: Sequence[Sequence[str]]) -> set[str]:
    """Return the columns that say nothing, or have no room."""
    hidden = set() if any(row[-1] for row in rows) else {"not finite"}
    if render.width() < _WIDE:
        hidden |= {"|B|", "|B-A|"}
    if not comparison.steps:
        hidden.add("per step")
    if all(row[_HEADING.index("changed")] == "-" for row in rows):
        hidden.add("changed")
    return hidden


def describe_indistinct(tensors: Sequence[Indistinct]) -> str:
    """Return how many tensors cannot be compared, and why."""
    both = all(tensor.near_a and tensor.near_b for tensor in tensors)
    where = "both sides" if both else "one side or both"
    differ = sum(tensor.differs for tensor in tensors)
    originals = f"; the originals of {counted(differ, 'tensor')} differ" if differ else ""
    return f"{counted(len(tensors), 'tensor')} cannot be told apart (near on {where}){originals}"


def _described(info: TensorInfo) -> str:
    return f"{render.printable(info.name)} {info.dtype} {list(info.shape)}"
