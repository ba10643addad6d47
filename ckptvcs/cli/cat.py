"""cat."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import Force, JsonOption, free_target, open_repo
from ckptvcs.errors import InvalidInputError
from ckptvcs.history.canonical_json import from_number
from ckptvcs.history.revision import split_tensor

if TYPE_CHECKING:
    from ckptvcs.decode.part_reader import PartReader, Window
    from ckptvcs.files.targets import Target

_SHOWN = 1000  # values, from which on a terminal gets the first and last ones only


def cat(
    context: typer.Context,
    where: Annotated[
        str, typer.Argument(metavar="REV:TENSOR", help="a commit and a tensor, or its name's end")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="write .npy, .pt or .safetensors"),
    ] = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Show one tensor of a commit, reading nothing else."""
    from ckptvcs.decode.part_reader import PartReader
    from ckptvcs.decode.trajectory import find_tensor
    from ckptvcs.files.targets import Targets

    revision, tensor = split_tensor(where)
    repo = open_repo(context)
    name = repo.resolve(revision)
    reader = PartReader(repo.restorer(name))
    full, window = find_tensor(reader.schema, tensor)
    view = window[1]
    about = {
        "id": name, "step": repo.catalog.commit(name).step, "name": full, "dtype": view.dtype,
        "shape": list(view.shape), "fidelity": reader.fidelity(window),
    }  # fmt: skip
    if output is not None:
        with Targets() as looks:
            _write_tensor(reader, full, window, free_target(looks, output, force=force))
        if json:
            render.as_json(about | {"path": str(output)})
        else:
            render.data(render.printable(str(output)))
        return
    values = _numbers(reader, window)
    found = _statistics(values)
    if json:
        render.as_json(about | {"statistics": found, "values": _plain(values.tolist())})
        return
    shape = " x ".join(map(str, view.shape)) or "one value"
    render.data(f"{render.printable(full)}  {view.dtype}  {shape}  {about['fidelity']}")
    render.data(
        "  ".join(f"{key} {value:.6g}" for key, value in found.items() if value is not None)
    )
    import numpy as np

    limit = _SHOWN if render.is_terminal() else values.size + 1
    render.data(*np.array2string(values, threshold=limit).split("\n"))


def _write_tensor(reader: PartReader, name: str, window: Window, target: Target) -> None:
    """Write one tensor in the format that the name of its file says."""
    suffix = target.path.suffix
    if suffix == ".npy":
        import numpy as np

        from ckptvcs.decode.part_reader import write_whole

        values = _numbers(reader, window)
        write_whole(target, lambda out: np.save(out, values, allow_pickle=False))
    elif suffix in (".pt", ".safetensors"):
        reader.save_tensor(name, window, target)
    else:
        raise InvalidInputError(f"{target.path} is not the name of a tensor file",
                                hint="end it in .npy, .pt or .safetensors")  # fmt: skip


def _numbers(reader: PartReader, window: Window) -> Any:
    """The values of a tensor as numpy has them; float32 where numpy lacks their type."""
    import numpy as np

    from ckptvcs.codec.words import to_float32

    data, view = reader.window(window), window[1]
    dtype = view.dtype
    if dtype == "BF16":
        flat: Any = to_float32(np.frombuffer(data, np.uint16), dtype)
    elif dtype == "C32":
        flat = np.frombuffer(data, np.float16).astype(np.float32).view(np.complex64)
    elif dtype == "F4":  # two numbers in a byte
        from ckptvcs.codec.words import to_float64

        pairs = to_float64(np.frombuffer(data, np.uint8), dtype).astype(np.float32)
        return pairs.reshape(*view.shape[:-1], 2 * (view.shape or (1,))[-1])
    elif dtype.startswith("F8"):
        from ckptvcs.checkpoint.state import make_tensor

        own = np.frombuffer(bytearray(data), np.uint8)
        one_by_one = type(view)(view.name, dtype, 0, (own.size,), (1,))
        flat = make_tensor(own, one_by_one, array=False).float().numpy()
    else:
        kinds = {"F": "f", "I": "i", "U": "u", "C": "c", "B": "b"}
        size = 1 if dtype == "BOOL" else int(dtype[1:]) // 8
        kind = "?" if dtype == "BOOL" else kinds[dtype[0]]
        flat = np.frombuffer(data, np.dtype("?" if kind == "?" else f"<{kind}{size}"))
    return flat.reshape(view.shape)


def _statistics(values: Any) -> dict[str, float | None]:
    """Of the finite values: min, max, mean, standard deviation, norm; counts of zeros and of others
    that are not finite.  None where there is nothing to tell.
    """
    import numpy as np

    wide = np.abs(values) if values.dtype.kind == "c" else values
    wide = wide.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    found: dict[str, float | None] = dict.fromkeys(("min", "max", "mean", "std", "norm"))
    if finite.size:
        with np.errstate(over="ignore", invalid="ignore"):
            found = {
                "min": float(finite.min()), "max": float(finite.max()),
                "mean": float(finite.mean()), "std": float(finite.std()),
                "norm": float(np.sqrt(np.square(finite).sum())),
            }  # fmt: skip
    counts = {"zeros": int((finite == 0).sum()), "not_finite": int(wide.size - finite.size)}
    plain = {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}
    return plain | counts


def _plain(value: Any) -> Any:
    """Nested lists of numbers as JSON can hold them; a complex number as two."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [from_number(value.real), from_number(value.imag)]
    return from_number(value) if isinstance(value, float) else value
