"""export, cat, average."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.history.canonical import from_number
from ckptvcs.history.commit import PARTS
from ckptvcs.history.revision import split_range, split_tensor
from ckptvcs.repo import Repo
from ckptvcs.store.object import ObjectId

if TYPE_CHECKING:
    from ckptvcs.decode.part_reader import PartReader, Window
    from ckptvcs.targets import Target, Targets

# numpy is loaded by what reads tensors, so that the other commands start without it.

Start = Annotated[str | None, typer.Option(metavar="REV", help="from this step or revision on")]
Stop = Annotated[str | None, typer.Option(metavar="REV", help="up to this one, included")]
Every = Annotated[
    int | None, typer.Option(metavar="STEPS", help="only steps that are multiples of this")
]
Force = Annotated[bool, typer.Option("--force", help="overwrite what is there")]

_FORMATS = ("pt", "safetensors")
_SHOWN = 1000  # values, from which on a terminal gets the first and last ones only


def export(
    context: typer.Context,
    revision: Annotated[str | None, typer.Argument(metavar="[REV]", help="a commit")] = None,
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="its file")] = None,
    folder: Annotated[
        Path | None, typer.Option("--all", metavar="DIR", help="every commit of a line, by step")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="pt|safetensors", help="else as committed")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="one part: model, optimizer or rest")
    ] = None,
    start: Start = None,
    stop: Stop = None,
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write commits as files: one, or with --all those of a line."""
    from ckptvcs.decode.trajectory import export as write_commits  # noqa: PLC0415  see above
    from ckptvcs.targets import Targets  # noqa: PLC0415

    if form not in (None, *_FORMATS):
        raise InvalidInputError(f"no format '{form}'", hint=f"formats: {', '.join(_FORMATS)}")
    if only is not None and only not in PARTS:
        raise InvalidInputError(f"no part '{only}'", hint=f"parts: {', '.join(PARTS)}")
    repo = open_repo(context)
    if folder is not None:
        if path is not None:
            raise InvalidInputError("--all DIR takes no PATH", hint="ckpt export [REV] --all DIR")
        names = repo.history.line(start, stop, every, revision=revision)
        targets = [folder / name for name in _file_names(repo, names, form, only)]
    elif revision is None or path is None:
        raise InvalidInputError("nothing to export to", hint="REV PATH, or --all DIR")
    else:
        names, targets = [repo.resolve(revision)], [path]
        if form and path.suffix == ".safetensors" and form != "safetensors":
            raise InvalidInputError(f"{path} is no name for --format {form}")
        if form == "safetensors" and path.suffix != ".safetensors":
            targets = [path.with_name(f"{path.name}.safetensors")]
    if not names:
        raise NotFoundError("no commit lies between these", hint="'ckpt log' lists them")
    entries = [repo.entry(name) for name in names]
    size_bytes = sum(entry.commit.raw_bytes for entry in entries)
    with Targets() as looks:
        places = [_look(looks, target, force=force) for target in targets]
        with render.progress("exporting", size_bytes) as tick:
            write_commits(repo.catalog, names, places, only, tick, force=force)
    if json:
        render.as_json([
            {"id": entry.id, "step": entry.step, "path": str(target),
             "exact": entry.fidelity.get(only, "") == "exact" if only else entry.exact}
            for entry, target in zip(entries, targets, strict=True)
        ])  # fmt: skip
        return
    for target in targets:
        render.data(render.printable(str(target)))


def _file_names(repo: Repo, names: list[ObjectId], form: str | None, only: str | None) -> list[str]:
    """A name for each commit: its step, and its id where that alone would not tell it apart."""
    commits = [repo.catalog.commit(name) for name in names]
    steps = Counter(commit.step for commit in commits)
    found = []
    for name, commit in zip(names, commits, strict=True):
        stem = f"commit-{name[:8]}" if commit.step is None else f"step-{commit.step}"
        if commit.step is not None and steps[commit.step] > 1:
            stem += f"-{name[:8]}"
        suffix = form or "pt"
        if form is None and all(f.format == "safetensors" for f in commit.files):
            suffix = "safetensors"
        whole = form is None and only is None and commit.source == "directory"
        found.append(stem if whole else f"{stem}.{suffix}")
    return found


def _look(looks: Targets, path: Path, *, force: bool) -> Target:
    """A target, held as it is now.  Raises ConflictError where something is in the way."""
    target = looks.look(path)
    if target.seen is not None and not force:
        raise ConflictError(f"{path} exists", hint="overwrite it with --force")
    return target


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
    from ckptvcs.decode.part_reader import PartReader  # noqa: PLC0415  see above
    from ckptvcs.decode.trajectory import find_tensor  # noqa: PLC0415
    from ckptvcs.targets import Targets  # noqa: PLC0415

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
            _write_tensor(reader, full, window, _look(looks, output, force=force))
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
    import numpy as np  # noqa: PLC0415  see above

    limit = _SHOWN if render.is_terminal() else values.size + 1
    render.data(*np.array2string(values, threshold=limit).split("\n"))


def _write_tensor(reader: PartReader, name: str, window: Window, target: Target) -> None:
    """Write one tensor in the format that the name of its file says."""
    suffix = target.path.suffix
    if suffix == ".npy":
        import numpy as np  # noqa: PLC0415  see above

        from ckptvcs.decode.part_reader import write_whole  # noqa: PLC0415

        values = _numbers(reader, window)
        write_whole(target, lambda out: np.save(out, values, allow_pickle=False))
    elif suffix in (".pt", ".safetensors"):
        reader.save_tensor(name, window, target)
    else:
        raise InvalidInputError(f"{target.path} is not the name of a tensor file",
                                hint="end it in .npy, .pt or .safetensors")  # fmt: skip


def _numbers(reader: PartReader, window: Window) -> Any:
    """The values of a tensor as numpy has them; float32 where numpy lacks their type."""
    import numpy as np  # noqa: PLC0415  see above

    from ckptvcs.codec.words import to_float32  # noqa: PLC0415

    data, view = reader.window(window), window[1]
    dtype = view.dtype
    if dtype == "BF16":
        flat: Any = to_float32(np.frombuffer(data, np.uint16), dtype)
    elif dtype == "C32":
        flat = np.frombuffer(data, np.float16).astype(np.float32).view(np.complex64)
    elif dtype == "F4":  # two numbers in a byte
        from ckptvcs.codec.words import to_float64  # noqa: PLC0415

        pairs = to_float64(np.frombuffer(data, np.uint8), dtype).astype(np.float32)
        return pairs.reshape(*view.shape[:-1], 2 * (view.shape or (1,))[-1])
    elif dtype.startswith("F8"):
        from ckptvcs.checkpoint.state import make_tensor  # noqa: PLC0415  torch knows these

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
    import numpy as np  # noqa: PLC0415  see above

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


def average(
    context: typer.Context,
    revisions: Annotated[str, typer.Argument(metavar="REV..REV", help="both ends included")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PATH", help="the checkpoint to write")
    ],
    every: Every = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write the mean of the weights of several commits."""
    from ckptvcs.average import write_average  # noqa: PLC0415  see above
    from ckptvcs.targets import Targets  # noqa: PLC0415

    start, stop = split_range(revisions)
    repo = open_repo(context)
    names = repo.history.line(start, stop, every)
    if not names:
        raise NotFoundError("no commit lies between these", hint="'ckpt log' lists them")
    commits = [repo.catalog.commit(name) for name in names]
    size_bytes = sum(commit.raw_bytes for commit in commits)
    with Targets() as looks:
        place = _look(looks, output, force=force)
        with render.progress("averaging", size_bytes) as tick:
            write_average(repo.catalog, names, place, tick, force=force)
    if json:
        render.as_json({
            "path": str(output), "commits": names, "steps": [commit.step for commit in commits],
        })  # fmt: skip
        return
    shown = render.printable(str(output))
    render.data(f"{shown}: the mean of {len(names)} commits, all else from {names[-1][:8]}")
