"""Notes: a message, metrics and fields of a commit that were written after it was made.

The commit and its id never change.  For each key, the note with the highest generation, time and id
counts.  Layout: docs/format.md, "Note".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptvcs.errors import CorruptionError
from ckptvcs.history.commit import is_time
from ckptvcs.history.fields import NUMBER, TEXT, Fields, mapping, nullable
from ckptvcs.store.ids import ObjectId

MAX_BYTES = 1 << 16
"""Limit of the content of a note."""

MAX_NOTES = 1 << 14
"""The notes of one commit after which writers refuse more."""

MAX_READ = 1 << 16
"""The notes of one commit that readers use."""


@dataclass(frozen=True)
class Note:
    """One note of a commit.

    Attributes:
        commit: The id of the commit.
        generation: One more than the highest of the notes that its writer knew; at least 1.
        time: The time of the note, ISO 8601 in UTC.
        user: The name of the user.
        message: The new message; None leaves it.
        metrics: The new metrics by name; None removes one.
        fields: The new fields by key; None removes one.
    """

    commit: ObjectId
    generation: int
    time: str
    user: str
    message: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    fields: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """The message, metrics and fields of a commit with all of its notes."""

    message: str
    metrics: Mapping[str, float]
    fields: Mapping[str, str]


_NOTE = Fields(
    Note,
    metrics=mapping(nullable(NUMBER))._replace(default={}),
    fields=mapping(nullable(TEXT))._replace(default={}),
)
dump_note = _NOTE.dump


def load_note(data: bytes) -> Note:
    """Parse a note.  Raises CorruptionError."""
    if len(data) > MAX_BYTES:
        raise CorruptionError(f"a note has more than {MAX_BYTES} bytes")
    note = _NOTE.load(data, "a note")
    if not note.generation or not is_time(note.time):
        raise CorruptionError("a note has no valid generation or time")
    return note


def in_order(notes: Iterable[tuple[ObjectId, Note]]) -> list[tuple[ObjectId, Note]]:
    """Return notes with their ids, sorted so that later ones count."""
    return sorted(notes, key=lambda pair: (pair[1].generation, pair[1].time, pair[0]))


def merge(message: str, metrics: Mapping[str, float], notes: Iterable[Note]) -> Merged:
    """Return the message and the metrics of a commit, changed by its notes `in_order`."""
    numbers: dict[str, float | None] = dict(metrics)
    texts: dict[str, str | None] = {}
    for note in notes:
        message = message if note.message is None else note.message
        numbers |= note.metrics
        texts |= note.fields
    return Merged(
        message,
        {name: value for name, value in sorted(numbers.items()) if value is not None},
        {key: value for key, value in sorted(texts.items()) if value is not None},
    )
