"""The commit object: the hashes of the committed tensors and files, not how they are stored.

A commit refers to a tensor hash table for every part, and to every file by the hash of its bytes.
Recipes say which frames decode to these values.  Recipes may change; the id of a commit never does.
Layout: docs/format.md, "Commit".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from ckptvcs.errors import CorruptionError
from ckptvcs.history.canonical_json import dump
from ckptvcs.history.fields import (
    NATURAL,
    NUMBER,
    SIGNED,
    TEXT,
    Fields,
    FieldType,
    many,
    mapping,
    nullable,
    optional,
    to_number,
)
from ckptvcs.store.ids import ObjectId, checked_id
from ckptvcs.text import from_number

PARTS = ("model", "optimizer", "rest")
"""Weights, optimizer state, everything else.  Each part decodes without the others."""

INEXACT = frozenset({"near", "archived"})
"""The forms of a part whose tensors may differ from the committed ones."""

ERRORS = "errors"
"""Name of the droppable table of errors by tensor, beside the parts."""


@dataclass(frozen=True)
class PartState:
    """One part of a commit.

    Attributes:
        values: The id of the hashes of the tensors that the delta chain decodes to.
        exact: The id of the hashes of the committed tensors, if they differ; readable as long as an
            exact patch exists.
    """

    values: ObjectId
    exact: ObjectId | None = None

    @property
    def fidelity(self) -> str:
        """`exact` if the delta chain decodes to the committed tensors, otherwise `near`."""
        return "exact" if self.exact is None else "near"


@dataclass(frozen=True)
class ArchivedState(PartState):
    """One part of an archived commit; the hashes of the committed tensors may be gone."""

    @property
    def fidelity(self) -> str:
        """The word `archived`."""
        return "archived"


@dataclass(frozen=True)
class FileEntry:
    """One committed file.

    Attributes:
        path: The relative path, with `/`.
        size: The size in bytes.
        hash: The BLAKE3 hash of the bytes in hex; None for a directory, a symbolic link, and
            a state that never was a file.
        mode: The permission bits.
        mtime_ns: The modification time in nanoseconds.
        format: The format, such as `torch-zip` or `safetensors`.
        skeleton: The id of the file template; None for a directory or a symbolic link.
        link: The target of a symbolic link.
    """

    path: str
    size: int
    hash: str | None
    mode: int
    mtime_ns: int
    format: str
    skeleton: ObjectId | None
    link: str | None = None


@dataclass(frozen=True)
class ErrorReport:
    """The error of the near form, measured at commit time, of one tensor or over all tensors.

    W is a committed weight, W' its near form, |x|^2 a sum of squares and v the second moment.  The
    base is the decoded weight of the parent.

    Attributes:
        weight_rel: |W' - W| / |W|.
        residual_nmse: |W' - W|^2 / |W - base|^2; for a moment, its relative squared error.
        fisher_nmse: `residual_nmse` with each square weighted by v.
        update_nmse: The relative squared error of the optimizer's next step, on a sample, with a
            gradient from N(0, v).
        max_abs: The largest absolute error.
        lag: |W' - W|^2 / |W - parent|^2, where the parent is the committed weight of the parent: by
            how many commits of a random walk the near form is late.  None without a parent, or
            if the weight did not move.
    """

    weight_rel: float = 0.0
    residual_nmse: float = 0.0
    fisher_nmse: float = 0.0
    update_nmse: float = 0.0
    max_abs: float = 0.0
    lag: float | None = None


ERROR_NAMES = ("weight_rel", "residual_nmse", "fisher_nmse", "update_nmse", "max_abs")
"""The fields of a report that are always known, as commits and `errors` objects name them."""


@dataclass(frozen=True)
class Commit:
    """One commit object.

    Attributes:
        parents: The ids of the parents, at most one.
        time: The time of the commit, ISO 8601 in UTC.
        step: The training step, if known.
        message: The message.
        metrics: The metrics by name.
        codec: The codec.
        kind: `keyframe` or `delta`.
        depth: The largest depth of its frames when it was written.
        raw_bytes: The size of the committed files in bytes.
        data_bytes: The size of its data packs in bytes when it was written.
        patch_bytes: The size of its exact patch in bytes when it was written.
        source: `file`, `directory` or `state`.
        path: The committed path.
        inside: Whether `path` is relative to the directory of the repository.
        schema: The id of the schema.
        parts: The parts by name: `model`, `optimizer` and `rest`.
        files: The committed files.
        error: The error of the near form over all tensors.
        errors: The id of the errors of single tensors; None if all are exact.
        host: The name of the machine.
        user: The name of the user.
        code: The git commit of the training code, if known.
        nonfinite: The number of infinite and NaN entries in weights and moments.
        provenance: The id of the provenance; None if none was recorded.
    """

    parents: tuple[ObjectId, ...]
    time: str
    step: int | None
    message: str
    metrics: Mapping[str, float]
    codec: str
    kind: str
    depth: int
    raw_bytes: int
    data_bytes: int
    patch_bytes: int
    source: str
    path: str
    inside: bool
    schema: ObjectId
    parts: Mapping[str, PartState]
    files: tuple[FileEntry, ...]
    error: ErrorReport
    errors: ObjectId | None
    host: str
    user: str
    code: str | None = None
    nonfinite: int = 0
    provenance: ObjectId | None = None

    @property
    def parent(self) -> ObjectId | None:
        """The id of the parent, if there is one."""
        return self.parents[0] if self.parents else None

    def parts_of_exact(self, values: ObjectId) -> list[str]:
        """Return the parts whose exact form has this tensor hash table."""
        return [part for part, state in self.parts.items() if state.exact == values]

    @property
    def exact(self) -> bool:
        """Whether the delta chain decodes to every file bit for bit."""
        return all(part.exact is None for part in self.parts.values())


def _parts_by_name(*states: PartState | None) -> dict[str, PartState]:
    named = zip(PARTS, states, strict=True)
    return {name: state for name, state in named if state is not None}


_PART = Fields(PartState)
_PARTS = Fields(_parts_by_name, **dict.fromkeys(PARTS, optional(_PART.type)))
_FILE = Fields(FileEntry, mtime_ns=SIGNED)
ERROR = FieldType(
    Fields(ErrorReport).type.load,
    lambda error: {k: from_number(v) for k, v in vars(error).items() if v is not None},
)
"""The type of a field with an error report."""

_COMMIT = Fields(
    Commit,
    step=nullable(SIGNED),
    parts=FieldType(_PARTS.type.load, mapping(_PART.type).dump),
    files=many(_FILE.type),
    error=ERROR,
    code=nullable(TEXT),
)
dump_commit = _COMMIT.dump

_METRICS, _PARENTS = b',"metrics":', b',"parents":['
_DECODER = json.JSONDecoder()


def is_time(text: str) -> bool:
    """Return whether a text is a time with a time zone."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _check_files(name: ObjectId, source: str, files: tuple[FileEntry, ...]) -> None:
    """Raise CorruptionError if a commit of this source cannot have these files."""
    whole = [file for file in files if file.skeleton is not None]
    single = source in ("file", "state") and len(files) == len(whole) == 1
    if not single and not (source == "directory" and whole):
        raise CorruptionError(f"commit {name[:8]} has invalid files for source {source[:20]!r}")


def load_commit(name: ObjectId, data: bytes) -> Commit:
    """Parse a commit.  Raises CorruptionError."""
    commit = _COMMIT.load(data, f"commit {name[:8]}")
    if len(commit.parents) > 1 or first_parent(data) != commit.parent:
        raise CorruptionError(f"commit {name[:8]} has duplicate parent fields")
    _check_files(name, commit.source, commit.files)
    if not is_time(commit.time):
        raise CorruptionError("invalid commit time")
    return commit


def first_parent(data: bytes) -> ObjectId | None:
    """Return the parent of a commit without parsing it, for walks of the history.

    Raises:
        CorruptionError: the field is missing.
    """
    # This text occurs once: a quote inside a string is escaped.
    at = data.find(_PARENTS)
    if at < 0:
        raise CorruptionError("a commit has no parents field")
    at += len(_PARENTS)
    if data[at : at + 1] == b"]":
        return None
    return checked_id(data[at + 1 : at + 65].decode("ascii", "replace"))


def find_metrics(data: bytes) -> dict[str, float]:
    """Return the metrics of a commit without parsing it.  Raises CorruptionError."""
    at = data.find(_METRICS)
    try:
        metrics, _ = _DECODER.raw_decode(data[at + len(_METRICS) :].decode("ascii"))
        return {name: to_number(value) for name, value in metrics.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptionError("a commit has no metrics field") from error


def dump_errors(errors: Mapping[int, ErrorReport]) -> bytes:
    """Return the canonical bytes of the errors of tensors, by position in the schema."""
    rows = sorted(errors)

    def column(name: str) -> list[float | str | None]:
        values = (getattr(errors[row], name) for row in rows)
        return [None if v is None else from_number(float(f"{v:.3g}")) for v in values]

    columns = {name: column(name) for name in (*ERROR_NAMES, "lag")}
    return dump({"tensors": rows, **columns})


def _errors_by_row(
    rows: tuple[int, ...], *columns: tuple[float | None, ...] | None
) -> dict[int, ErrorReport]:
    filled = [(None,) * len(rows) if column is None else column for column in columns]
    if any(len(column) != len(rows) for column in filled):
        raise CorruptionError("a table of errors has columns of different lengths")
    return {row: ErrorReport(*values) for row, *values in zip(rows, *filled, strict=True)}


_ERRORS = Fields(
    _errors_by_row,
    tensors=many(NATURAL),
    **dict.fromkeys(ERROR_NAMES, many(NUMBER)),
    lag=optional(many(nullable(NUMBER))),
)


def load_errors(data: bytes) -> dict[int, ErrorReport]:
    """Parse the errors of tensors.  Raises CorruptionError."""
    return _ERRORS.load(data, "a table of errors")
