"""checkout."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, Part, open_repo
from ckptvcs.errors import CkptError, InvalidInputError, after
from ckptvcs.repo import Repo
from ckptvcs.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckptvcs import Commit, LogEntry


_Revision = Annotated[
    str | None, Argument(metavar="REV", help="step, tag, branch, id, HEAD~2, best:loss:min ...")
]
_Output = Annotated[
    str | None,
    Option("-o", "--output", metavar="PATH", help="output path (moves HEAD only with -b)"),
]
_Force = Annotated[
    bool, Option("-f", "--force", help="overwrite files that no commit contains exactly")
]
_Require = Annotated[
    Literal["exact", "near"] | None,
    Option(metavar="exact|near", help="refuse a commit whose form is farther off than this"),
]
_Branch = Annotated[
    str | None,
    Option("-b", "--branch", metavar="NAME", help="start a branch at REV (default: HEAD)"),
]
_Near = Annotated[
    bool, Option("--near", help="write the near form, even if the commit is exact (with -o)")
]


def checkout(
    context: Context,
    revision: _Revision = None,
    output: _Output = None,
    force: _Force = False,
    only: Part = None,
    require: _Require = None,
    near: _Near = False,
    branch: _Branch = None,
    json: JsonOption = False,
) -> None:
    """Restore the files of a commit."""
    if output == "-":
        raise InvalidInputError(
            "checkpoints cannot be written to stdout", hint="pass a file name: -o model.pt"
        )
    if revision is None and branch is None:
        raise InvalidInputError("missing argument REV", hint="run 'ckpt checkout --help'")
    if branch is not None and only:
        raise InvalidInputError("--branch cannot be combined with --only")
    if near and only:
        raise InvalidInputError("--near cannot be combined with --only", hint="leave one out")
    repo = open_repo(context)
    if branch is None:
        _restore(
            repo, str(revision), output, only, force=force, require=require, near=near, json=json
        )
        return
    name = repo.branch(branch, revision or "HEAD")
    if revision is None:  # the files are those of HEAD, perhaps with changes
        repo.move_head(branch)
        at = f"branch {branch} at {name[:8]}"
        render.answer({"id": name, "paths": [], "branch": branch}, at, json=json)
        return
    try:
        _restore(repo, branch, output, only, force=force, require=require, near=near, json=json)
        if output:
            repo.move_head(branch)
    except BaseException:
        with contextlib.suppress(CkptError):  # HEAD is on it: the error came after the checkout
            repo.delete_branch(branch)
        raise


def _restore(
    repo: Repo,
    revision: str,
    output: str | None,
    only: str | None,
    *,
    force: bool,
    require: str | None,
    near: bool,
    json: bool,
) -> None:
    name = repo.resolve(revision)
    entry = repo.entry(name)
    target, where = Path(output) if output else None, None
    if target is not None and not only and not repo.suffix_fits(name, target):
        only = "model"
        render.talk(f"note: {target} gets the weights only; the commit has another format")
    announce = _ignore if target else partial(_announce, None if only else entry.commit)
    if only:
        done = repo.checkout_part(
            name, only, target, force=force, require=require, announce=announce
        )
    else:
        with render.progress("checking out", entry.commit.raw_bytes) as tick:
            done = repo.checkout_files(
                name,
                target,
                force=force,
                require=require,
                near=near,
                progress=tick,
                announce=announce,
            )
        with after("" if target else "the files were written"):
            where = (
                None if target else repo.move_head(name if revision == "latest-good" else revision)
            )
    entry = replace(entry, fidelity=done.fidelity)  # an exact form may have faded by now
    if json:
        render.as_json(
            render.attributes(entry, "id step")
            | {"paths": done.paths}
            | render.attributes(entry, "fidelity exact")
            | {"branch": where}
        )
        return
    _tell(entry, done.paths)
    if target is None and not only and where is None:
        render.talk("note: HEAD is at an older commit; the next commit starts a branch")


def _tell(entry: LogEntry, paths: Sequence[Path]) -> None:
    shown = render.printable(str(paths[0])) if len(paths) == 1 else f"{len(paths)} files"
    step = "" if entry.commit.step is None else f" step {entry.commit.step},"
    render.data(f"{shown}:{step} {entry.id[:8]}, {entries.fidelity(entry)}")


def _ignore(_: Path) -> None:
    """Print nothing: the user has named the path."""


def _announce(commit: Commit | None, path: Path) -> None:
    """Print the path that the commit names before files are written there."""
    files = ""
    if commit is not None and commit.source == "directory":
        count = sum(file.skeleton is not None for file in commit.files)
        files = f"{counted(count, 'file')} to "
    render.talk(f"writing {files}{path}")
