"""note."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Context, Option

from ckptvcs.cli import entries, render
from ckptvcs.cli.context import JsonOption, Metrics, Revision, open_repo, parse_metrics
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptvcs import Note

_T = TypeVar("_T")


def note(
    context: Context,
    revision: Revision,
    message: Annotated[
        str | None, Option("-m", "--message", metavar="TEXT", help="new message")
    ] = None,
    metric: Metrics = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="field of text; can be repeated"),
    ] = None,
    unset: Annotated[
        list[str] | None, Option(metavar="KEY", help="remove a field; can be repeated")
    ] = None,
    unset_metric: Annotated[
        list[str] | None, Option(metavar="NAME", help="remove a metric; can be repeated")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Add a message or metrics to an existing commit, or list its notes."""
    repo = open_repo(context)
    if message is None and not (metric or set_ or unset or unset_metric):
        _list(repo.notes(revision), json=json)
        return
    metrics = _joined(parse_metrics(metric), unset_metric)
    fields = _joined(dict(_field(text) for text in set_ or ()), unset)
    written = repo.note(revision, message=message, metrics=metrics, fields=fields)
    step = repo.entry(written.commit).step
    title = "" if step is None else f", step {step}"
    render.answer(written, f"noted {written.commit[:8]}{title}: {_changes(written)}", json=json)
    _warn_if_near(repo, written)


def _joined(written: Mapping[str, _T], removed: Sequence[str] | None) -> dict[str, _T | None]:
    """Return new values, with None for the removed ones."""
    for name in removed or ():
        if name in written:
            raise InvalidInputError(
                f"'{name}' is written and removed", hint="leave out one of the two options"
            )
    return {**written, **dict.fromkeys(removed or ())}


def _field(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidInputError(f"invalid field '{text}'", hint="write --set data=wikitext")
    return key, value


def _warn_if_near(repo: Repo, written: Note) -> None:
    """Say that a commit became one of the best after its exact patch had expired."""
    best = ""
    with contextlib.suppress(InvalidInputError):  # unreadable settings were reported before
        best = str(repo.setting("keep-best") or "")
    named = any(best.startswith(f"{name}:") for name in written.metrics)
    if named and repo.is_best(written.commit) and not repo.entry(written.commit).exact:
        render.talk(
            f"note: {written.commit[:8]} is among the best now (keep-best {best}), but near: its "
            "exact patch has expired"
        )


def _list(notes: Sequence[Note], *, json: bool) -> None:
    if json:
        render.as_json(notes)
    elif notes:
        rows = [["time (UTC)", "user", "note"]]
        for note in notes:
            time = note.time[:19].replace("T", " ")
            rows.append([time, render.printable(note.user), _changes(note)])
        render.table(rows)
    else:
        render.talk("no notes")


def _changes(note: Note) -> str:
    """Return a line like `"evaluated" eval_loss=2.31 data=wikitext; removed acc, host`."""
    metrics = {name: value for name, value in note.metrics.items() if value is not None}
    fields = {key: value for key, value in note.fields.items() if value is not None}
    pairs = (*note.metrics.items(), *note.fields.items())
    removed = ", ".join(render.printable(name) for name, value in pairs if value is None)
    shown = [] if note.message is None else [f'"{render.printable(note.message)}"']
    shown += [entries.metrics(metrics), entries.fields(fields)]
    written = " ".join(filter(None, shown))
    return "; ".join(filter(None, [written, removed and f"removed {removed}"]))
