"""bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import Force, JsonOption, Part, open_repo
from ckptvcs.errors import InvalidInputError

if TYPE_CHECKING:
    from ckptvcs import Bundled

_PASSES = 3  # over the data of a commit: re-encode, decode near, decode exactly


def bundle(
    context: Context,
    revisions: Annotated[list[str], Argument(metavar="REV...", help="commits or ranges A..B")],
    file: Annotated[Path, Argument(metavar="FILE", help="output file, such as run.ckptz")],
    exact: Annotated[
        bool, Option("--exact", help="refuse commits that are not exact any more")
    ] = False,
    near: Annotated[bool, Option("--near", help="leave out exact patches")] = False,
    only: Part = None,
    force: Force = False,
    json: JsonOption = False,
) -> None:
    """Write commits to one file, to share them."""
    if exact and near:
        raise InvalidInputError("--exact and --near cannot be combined")
    if not file.suffix or ".." in file.name:
        raise InvalidInputError(
            f"'{file}' is not the name of a bundle file",
            hint="name the file last, for example run.ckptz",
        )
    repo = open_repo(context)
    entries = map(repo.entry, repo.select(revisions))
    size = _PASSES * sum(entry.commit.raw_bytes for entry in entries)
    form = "exact" if exact else "near" if near else None
    with render.progress("bundling", size) as tick:
        done = repo.bundle(revisions, file, form=form, only=only, force=force, progress=tick)
    if json:
        render.as_json(_json(done))
        return
    render.data(
        f"{render.printable(str(done.path))}: {_described(done)}, {render.size(done.size_bytes)}"
    )
    if done.patch_bytes and not exact:
        render.talk(
            f"note: exact patches take {render.size(done.patch_bytes)} of that;"
            " --near leaves them out"
        )


def _described(done: Bundled) -> str:
    """Return how many commits a file has, and how many of them exactly."""
    steps = [entry.step for entry in done.entries if entry.step is not None]
    count, exact = len(done.entries), len(done.exact)
    forms = "exact" if all(_lasts(done, name) for name in done.exact) else "exact for now"
    if count == 1:
        which = f" of step {steps[0]}" if steps else f" {done.entries[0].id[:8]}"
        return f"1 commit{which}, {forms if exact else 'near'}"
    of = f" of steps {min(steps)}..{max(steps)}" if steps else ""
    return f"{count} commits{of}, {exact} {forms}, {count - exact} near"


def _lasts(done: Bundled, name: str) -> bool:
    """Return whether a commit stays exact in a clone: by a tag or pin, or without a patch."""
    kept = {commit for ref, commit in done.refs.items() if not ref.startswith("heads/")}
    (commit,) = (entry.commit for entry in done.entries if entry.id == name)
    return name in kept or all(part.exact is None for part in commit.parts.values())


def _json(done: Bundled) -> render.Json:
    return {
        "path": str(done.path),
        "bytes": done.size_bytes,
        "patch_bytes": done.patch_bytes,
        "commits": [
            {"id": entry.id, "step": entry.step, "exact": entry.id in done.exact}
            for entry in done.entries
        ],
        "refs": dict(done.refs),
    }
