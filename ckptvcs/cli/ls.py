"""ls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, Part, open_repo
from ckptvcs.text import counted, from_number

if TYPE_CHECKING:
    from ckptvcs import TensorEntry

_WIDE = 100  # columns of a terminal that has room for the part


def ls(
    context: Context,
    revision: Annotated[
        str, Argument(metavar="[REV]", help="commit (default: HEAD)", show_default=False)
    ] = "HEAD",
    pattern: Annotated[
        str | None, Argument(metavar="[PATTERN]", help="glob, or a text that the names contain")
    ] = None,
    only: Part = None,
    json: JsonOption = False,
) -> None:
    """List the tensors of a commit."""
    found = open_repo(context).tensors(revision, pattern, only=only, small=True)
    if json:
        render.as_json([_json(one) for one in found])
        return
    if not found:
        render.talk("no tensors match")
        return
    heading = ["name", "part", "role", "dtype", "shape", "size", "error"]
    rows = [heading, *map(_row, found)]
    if render.width() < _WIDE:
        rows = [
            [cell for cell, name in zip(row, heading, strict=True) if name != "part"]
            for row in rows
        ]
    render.table(rows)
    for one in found:
        for alias in one.aliases:
            render.data(
                f"{render.printable(alias)} is the same tensor as {render.printable(one.name)}"
            )
    if pattern is None:
        total = render.size(sum(one.size_bytes for one in found))
        render.talk(f"{counted(len(found), 'tensor')}, {total}")


def _json(one: TensorEntry) -> dict[str, Any]:
    error = one.relative_error
    return {
        "name": one.name,
        "aliases": list(one.aliases),
        "part": one.part,
        "role": one.role,
        "dtype": one.dtype,
        "shape": list(one.shape),
        "bytes": one.size_bytes,
        "form": one.form,
        "exact_lasts": one.exact_lasts,
        "error": None if error is None else from_number(error),
    }


def _row(one: TensorEntry) -> list[str]:
    error = one.relative_error
    form = entries.tensor_form(one)
    return [
        render.printable(one.name),
        one.part,
        one.role,
        one.dtype,
        " x ".join(map(str, one.shape)),
        render.size(one.size_bytes),
        f"{error:.2g}" if one.form == "near" and error is not None else form,
    ]
