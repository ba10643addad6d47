"""Records of what gc deletes or replaces, written durably before anything is deleted.

    fade      parts that lose their exact patch
    drop      commits, or parts of commits
    archive   parts that are stored in another form, which takes less (see `Archived`)
    undo      reverts drops and archives

Layout: docs/format.md, "Records".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptvcs.errors import CorruptionError
from ckptvcs.history.canonical_json import Json
from ckptvcs.history.commit import ERROR, PARTS, ArchivedState, Commit, ErrorReport
from ckptvcs.history.fields import ID, Fields, FieldType, many, mapping
from ckptvcs.store.ids import ObjectId

LEFT_OUT = "bundle"
"""The rule of the records that say what a bundle file left out; no undo brings that back."""


DIRECT = "import --archive"
"""The rule of archives of commits that nobody has seen in another form: no undo reverts them."""


@dataclass(frozen=True)
class Archived:
    """How one commit is archived.

    Attributes:
        commit: The id of the commit.
        parts: The id of the tensor hash table of each archived part, by name.
        error: The error of the archived form, in the place of that of the near form.
        data_bytes: The bytes of the frames that the archived form added.
        between: The commits between which the form is interpolated; none if it is an anchor.
    """

    commit: ObjectId
    parts: Mapping[str, ObjectId]
    error: ErrorReport
    data_bytes: int = 0
    between: tuple[ObjectId, ...] = ()


def in_form(commit: Commit, form: Archived) -> Commit:
    """Return a commit with the parts, the error and the size of its archived form."""
    archived = {
        name: ArchivedState(form.parts[name], state.exact or state.values)
        for name, state in commit.parts.items()
        if name in form.parts
    }
    return replace(
        commit,
        parts={**commit.parts, **archived},
        error=form.error,
        errors=None,
        data_bytes=form.data_bytes,
        patch_bytes=0,
    )


def _load_parts(value: Json) -> dict[str, ObjectId]:
    parts: dict[str, ObjectId] = mapping(ID).load(value)
    if not parts or not parts.keys() <= set(PARTS):
        raise ValueError
    return parts


ARCHIVED = Fields(Archived, parts=FieldType(_load_parts), error=ERROR).type
"""The type of a field that says how a commit is archived."""


@dataclass(frozen=True)
class DropRecord:
    """A fade, a drop, an archive, or an undo of such records.

    A fade names parts that lose their exact patch, a drop the dropped parts, or whole commits if it
    names none.  An archive has a row in `archived` for each of its commits.  `undoes` are record
    ids.  `after` holds the version of each branch, because clocks can be wrong.

    Records are durable before anything is deleted: a patch or bundle that is missing without a
    record is damage.
    """

    what: str
    commits: tuple[ObjectId, ...]
    parts: tuple[str, ...]
    rule: str
    time: str
    undoes: tuple[ObjectId, ...] = ()
    after: tuple[tuple[str, int], ...] = ()
    archived: tuple[Archived, ...] = ()


def _load_version(value: Json) -> tuple[str, int]:
    if type(value) is not list or [type(item) for item in value] != [str, int]:
        raise ValueError
    return value[0], value[1]


_DROP_RECORD = Fields(DropRecord, after=many(FieldType(_load_version)), archived=many(ARCHIVED))
dump_drop_record = _DROP_RECORD.dump


def load_drop_record(data: bytes) -> DropRecord:
    """Parse a record.  Raises CorruptionError."""
    record = _DROP_RECORD.load(data, "a record")
    if record.what not in ("fade", "drop", "archive", "undo"):
        raise CorruptionError("a drop record has an unknown type")
    if tuple(row.commit for row in record.archived) != (
        record.commits if record.what == "archive" else ()
    ):
        raise CorruptionError("a record does not say how each of its commits is archived")
    return record
