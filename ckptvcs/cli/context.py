"""What every command needs: the repository it works on, and its options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo

JsonOption = Annotated[bool, Option("--json", help="print JSON")]

Revision = Annotated[
    str, Argument(metavar="REV", help="step, tag, branch, id, HEAD~2, best:loss:min ...")
]


Start = Annotated[str | None, Option(metavar="REV", help="first step or revision")]
Stop = Annotated[str | None, Option(metavar="REV", help="last step or revision, included")]
Every = Annotated[
    int | None, Option(metavar="STEPS", help="only steps that are multiples of STEPS")
]
Count = Annotated[
    int | None, Option("-n", "--max-count", metavar="N", min=1, help="maximum number of rows")
]
Part = Annotated[
    Literal["model", "optimizer", "rest"] | None,
    Option("--only", metavar="PART", help="only this part: model, optimizer or rest"),
]
ExportFormat = Annotated[
    str | None,
    Option("--format", metavar="pt|safetensors", help="output format (default: as committed)"),
]
Branch = Annotated[
    str | None, Option("--branch", metavar="NAME", help="target branch (does not move HEAD)")
]
Codec = Annotated[
    str | None,
    Option(metavar="NAME", help="codec: near, lossless or excp (default: setting codec)"),
]
Pattern = Annotated[
    str | None, Option(metavar="GLOB", help="only names that match, for example 'step*.pt'")
]
Metrics = Annotated[
    list[str] | None, Option("--metric", metavar="NAME=VALUE", help="metric; can be repeated")
]
Force = Annotated[bool, Option("-f", "--force", help="overwrite existing files")]

Yes = Annotated[bool, Option("--yes", help="do not ask for confirmation")]
Now = Annotated[bool, Option("--now", help="delete data at once, without the grace period")]

BundleFile = Annotated[Path, Argument(metavar="FILE", help="file that 'ckpt bundle' wrote")]


@dataclass(frozen=True)
class Globals:
    """The options before the command."""

    repo: Path | None


def locate(context: Context) -> Path:
    """Return the directory that --repo or CKPT_DIR names, or else the nearest parent repository.

    Raises:
        NotFoundError: No repository was found.
    """
    return Repo.locate(context.find_root().obj.repo or os.environ.get("CKPT_DIR") or None)


def open_repo(context: Context) -> Repo:
    """Open the repository that the command line names.

    Raises:
        NotFoundError: No repository was found.
    """
    repo = Repo(locate(context))
    try:
        repo.settings()
    except InvalidInputError as error:  # a command that needs the settings raises it
        render.complain(f"warning: {error.message}")
    return repo


def parse_metrics(texts: Sequence[str] | None) -> dict[str, float]:
    """Return the metrics of options `NAME=VALUE`.

    Raises:
        InvalidInputError: a text has another form.
    """
    metrics = {}
    for text in texts or ():
        name, equals, value = text.rpartition("=")  # names may contain it
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise InvalidInputError(f"invalid metric '{text}'", hint="write --metric loss=2.31")
        metrics[name] = number
    return metrics


def size_of(path: Path) -> int | None:
    """Return the bytes of a file or of all files of a directory, if they can be read."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    except OSError:
        return None


def split_range(text: str) -> tuple[str | None, str | None]:
    """Return both ends of `A..B`; None for an end that is left out.

    Raises:
        InvalidInputError: `text` is not a range.
    """
    start, dots, stop = text.partition("..")
    if not dots or ".." in stop:
        raise InvalidInputError(f"invalid range '{text}'", hint="write 1000..2000")
    return start or None, stop or None


def step_range(text: str) -> tuple[int | None, int | None]:
    """Return the steps of `A..B`, or of a single step; None for an end that is left out.

    Raises:
        InvalidInputError: `text` is not a range of steps.
    """
    start, stop = split_range(text) if ".." in text else (text, text)
    for step in (start, stop):
        if step is not None and not step.isdecimal():
            raise InvalidInputError(f"invalid step '{step}'", hint="write --steps 1000..2000")
    return None if start is None else int(start), None if stop is None else int(stop)
