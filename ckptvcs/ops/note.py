"""note: write a message, metrics and fields beside a commit; the commit and its id stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.format_file import raise_flags, require_flags
from ckptvcs.history.note import MAX_BYTES, MAX_NOTES, Note, dump_note, load_note
from ckptvcs.ops.arguments import plain_message, plain_metrics
from ckptvcs.ops.provenance import user
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.leases import lease


def write(
    repository: Repository,
    revision: str | int,
    *,
    message: object = None,
    metrics: Mapping[Any, object] | None = None,
    fields: Mapping[Any, object] | None = None,
) -> Note:
    """Write a note of a commit; see `Repo.note`."""
    text = None if message is None else plain_message(message)
    numbers, texts = _plain_values(metrics or {}), _plain_fields(fields or {})
    if text is None and not numbers and not texts:
        raise InvalidInputError("the note is empty", hint="pass a message, metrics or fields")
    require_flags(repository.backend, "write")
    with lease(repository.backend):  # no gc deletes the commit meanwhile
        repository.catalog.forget_drops()
        name = repository.resolve(revision)
        if name in repository.catalog.dropped().commits:
            raise NotFoundError(f"commit {name[:8]} was dropped", hint="see 'ckpt reflog'")
        _require_values(repository.catalog, name, numbers, texts)
        note = Note(
            name, _next_generation(repository.catalog, name), now(), user(), text, numbers, texts
        )
        content = dump_note(note)
        if len(content) > MAX_BYTES:
            raise InvalidInputError(
                f"the note has {len(content)} bytes, more than {MAX_BYTES}",
                hint="write less, or commit a file",
            )
        load_note(content)  # readers ignore an unreadable note
        raise_flags(repository.backend, "read", "notes")
        with repository.catalog.store.packing("meta") as pack:
            pack.add(Kind.NOTE, content)
    return note


def notes(repository: Repository, revision: str | int) -> list[Note]:
    """Return the notes of a commit, newest first; see `Repo.notes`."""
    found = repository.catalog.notes(repository.resolve(revision))
    return [note for _, note in reversed(found)]


def is_best(repository: Repository, revision: str | int) -> bool:
    """Return whether the setting `keep-best` picks a commit; see `Repo.is_best`."""
    best = repository.config.exact_rule.best
    if best is None:
        return False
    commits = repository.catalog.noted(repository.revisions.visible().items())
    return repository.resolve(revision) in best.pick(commits)


def _plain_values(metrics: Mapping[Any, object]) -> dict[str, float | None]:
    """Return metrics as floats, with None where a metric is removed.  Raises InvalidInputError."""
    given = {name: value for name, value in metrics.items() if value is not None}
    numbers: dict[str, float | None] = dict(plain_metrics(given))
    numbers |= {name: None for name, value in metrics.items() if value is None}
    _check_names("metric", numbers)
    return numbers


def _plain_fields(fields: Mapping[Any, object]) -> dict[str, str | None]:
    """Return fields if they are text or None.  Raises InvalidInputError."""
    texts: dict[str, str | None] = {}
    for key, value in fields.items():
        if value is not None and not isinstance(value, str):
            raise InvalidInputError(f"field {key!r} must be text, got {value!r}")
        texts[key] = value
    _check_names("field", texts)
    return texts


def _check_names(what: str, names: Mapping[Any, object]) -> None:
    for name in names:
        if not isinstance(name, str) or not name:
            raise InvalidInputError(f"the name of a {what} must be text, got {name!r}")


def _require_values(
    catalog: Catalog, name: ObjectId, metrics: Mapping[str, object], fields: Mapping[str, object]
) -> None:
    """Check that a commit has the values that a note removes.  Raises NotFoundError."""
    commit = catalog.commit(name)
    present = catalog.merged(name, commit.message, commit.metrics)
    for what, new, old in (("metric", metrics, present.metrics), ("field", fields, present.fields)):
        for key, value in new.items():
            if value is None and key not in old:
                raise NotFoundError(
                    f"commit {name[:8]} has no {what} '{key}'", hint="see 'ckpt show'"
                )


def _next_generation(catalog: Catalog, name: ObjectId) -> int:
    """Return the generation of a new note.  Raises InvalidInputError if there are too many."""
    known = catalog.notes(name)
    if len(known) >= MAX_NOTES:
        raise InvalidInputError(f"commit {name[:8]} has {len(known)} notes, the most that it can")
    return 1 + max((note.generation for _, note in known), default=0)
