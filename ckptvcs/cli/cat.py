"""cat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import Force, JsonOption, open_repo
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from ckptvcs import TensorView

_SHOWN = 1000  # values, from which on a terminal gets the first and last ones only


def cat(
    context: Context,
    where: Annotated[
        str, Argument(metavar="REV:TENSOR", help="commit and tensor (full name or its end)")
    ],
    output: Annotated[
        Path | None,
        Option("-o", "--output", metavar="FILE", help="output file: .npy, .pt or .safetensors"),
    ] = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Print one tensor of a commit."""
    repo = open_repo(context)
    view = repo.tensor_view(where)
    about = render.attributes(view, "id step name dtype shape fidelity")
    if output is not None:
        view.save(output, force=force)
        render.answer(about | {"path": output}, render.printable(str(output)), json=json)
        return
    values, statistics = view.values, view.statistics()
    if json:
        render.as_json(about | {"statistics": statistics, "values": values.tolist()})
        return
    shape = " x ".join(map(str, view.shape)) or "one value"
    render.data(f"{render.printable(view.name)}  {view.dtype}  {shape}  {_form(repo, view)}")
    numbers = [f"{key} {value:.6g}" for key, value in statistics.items() if value is not None]
    counts = 2  # zeros, not finite
    render.data("  ".join(numbers[:-counts]), "  ".join(numbers[-counts:]))
    import numpy as np

    limit = _SHOWN if render.is_terminal() else values.size + 1
    render.data(*np.array2string(values, threshold=limit).split("\n"))


def _form(repo: Repo, view: TensorView) -> str:
    """Return the form of a tensor: `exact`, `exact for now` or `near`."""
    listed = {one.name: one for one in repo.tensors(view.id, small=True)}
    tensor = listed.get(view.name)
    return view.fidelity if tensor is None else entries.tensor_form(tensor)
