"""cat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Force, JsonOption, open_repo
from ckptvcs.text import from_number

_SHOWN = 1000  # values, from which on a terminal gets the first and last ones only


def cat(
    context: typer.Context,
    where: Annotated[
        str, typer.Argument(metavar="REV:TENSOR", help="commit and tensor (full name or its end)")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="output file: .npy, .pt or .safetensors"
        ),
    ] = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Print one tensor of a commit."""
    view = open_repo(context).tensor_view(where)
    about = {
        "id": view.id,
        "step": view.step,
        "name": view.name,
        "dtype": view.dtype,
        "shape": list(view.shape),
        "fidelity": view.fidelity,
    }
    if output is not None:
        view.save(output, force=force)
        if json:
            render.as_json(about | {"path": str(output)})
        else:
            render.data(render.printable(str(output)))
        return
    values, found = view.values, view.statistics()
    if json:
        render.as_json(about | {"statistics": found, "values": _plain(values.tolist())})
        return
    shape = " x ".join(map(str, view.shape)) or "one value"
    render.data(f"{render.printable(view.name)}  {view.dtype}  {shape}  {view.fidelity}")
    numbers = [f"{key} {value:.6g}" for key, value in found.items() if value is not None]
    counts = 2  # zeros, not finite
    render.data("  ".join(numbers[:-counts]), "  ".join(numbers[-counts:]))
    import numpy as np

    limit = _SHOWN if render.is_terminal() else values.size + 1
    render.data(*np.array2string(values, threshold=limit).split("\n"))


def _plain(value: Any) -> Any:
    """Nested lists of numbers as JSON can hold them; a complex number as two."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [from_number(value.real), from_number(value.imag)]
    return from_number(value) if isinstance(value, float) else value
