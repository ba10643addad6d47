"""Whether a checkpoint is what a commit holds already: all of it, or its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptvcs.checkpoint.matching import alike
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.skeleton import skeleton_of
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.history.recipe import dump_values
from ckptvcs.history.revision import Revisions
from ckptvcs.history.schema import Schema, TensorInfo
from ckptvcs.ops.placement import Likeness
from ckptvcs.store.ids import Kind, ObjectId, object_id


@dataclass(frozen=True)
class Scanned:
    """A checkpoint and the hashes of its files (in order) and tensors (by number); `patched` says
    whether its exact form is wanted.
    """

    checkpoint: Checkpoint
    file_hashes: list[str | None]
    hashes: dict[int, bytes]
    patched: bool


def compare(
    catalog: Catalog, revisions: Revisions, scanned: Scanned, parent: ObjectId | None
) -> Likeness:
    """Return what a commit shares with a checkpoint.  Same weights at the same step mean the same
    run, whatever else the two hold.
    """
    if parent is None:
        return Likeness.NOTHING
    commit = catalog.commit(parent)
    if revisions.whole(parent) and _is_all(catalog, scanned, commit):
        return Likeness.ALL
    schema, weights = scanned.checkpoint.schema, commit.parts.get("model")
    if weights is None or not schema.stored("model"):
        return Likeness.NOTHING
    same = _table(schema, "model", scanned.hashes) == (weights.exact or weights.values)
    return Likeness.WEIGHTS if same else Likeness.NOTHING


def _is_all(catalog: Catalog, scanned: Scanned, commit: Commit) -> bool:
    """Whether a commit holds just these tensors, bit for bit.  What stands around them in a file
    may be other; in a state nothing may.
    """
    checkpoint, hashes = scanned.checkpoint, scanned.hashes
    exact = [state.exact for state in commit.parts.values() if state.exact is not None]
    if scanned.patched and any(is_gone(catalog, values) for values in exact):
        return False  # here is the exact form again
    old, schema = catalog.schema(commit.schema), checkpoint.schema
    if checkpoint.kind != "state":
        held = {file.path: file.hash for file in commit.files if file.hash}
        new = {f.path: h for f, h in zip(checkpoint.files, scanned.file_hashes, strict=True)}
        if held == new and _stored(old) == _stored(schema):
            return True
    tables = {part: _table(schema, part, hashes) for part in PARTS if schema.stored(part)}
    known = {part: state.exact or state.values for part, state in commit.parts.items()}
    if commit.source != checkpoint.kind or known != tables:
        return False
    if checkpoint.kind != "state":
        return bool(tables) and _stored(old) == _stored(schema)
    skeletons = [object_id(Kind.SKELETON, skeleton_of(checkpoint, f)) for f in checkpoint.files]
    return old == schema and [file.skeleton for file in commit.files] == skeletons


def is_gone(catalog: Catalog, exact: ObjectId) -> bool:
    """Return whether exact values have no patch, or one that somebody lets go."""
    return not catalog.has_recipe(exact) or catalog.is_fading(exact)


def has_other_weights(catalog: Catalog, checkpoint: Checkpoint, base: Commit) -> bool:
    """Return whether a commit has weights of other names, types or shapes."""
    old, new = catalog.schema(base.schema), checkpoint.schema
    names = alike([info.name for info in old.tensors], [info.name for info in new.tensors])
    return _weights(old, {}) != _weights(new, names)


def _table(schema: Schema, part: str, hashes: Mapping[int, bytes]) -> ObjectId:
    """The id of the hash table of a part."""
    return object_id(Kind.VALUES, dump_values([hashes[n] for n in schema.stored(part)]))


def _stored(schema: Schema) -> dict[int, TensorInfo]:
    """The tensors that do not stand in skeletons, by position."""
    return {number: info for number, info in enumerate(schema.tensors) if not info.inline}


def _weights(schema: Schema, names: Mapping[str, str]) -> set[tuple[str, str, tuple[int, ...]]]:
    """The weights by name, type and shape; `names` says what others call them."""
    infos = (schema.tensors[number] for number in schema.stored("model"))
    return {(names.get(info.name, info.name), info.dtype, info.shape) for info in infos}
