"""Compare a checkpoint with a commit: the same content, or the same weights."""

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
    """A checkpoint with the hashes of its files (in order) and tensors (by number).

    `patched` says whether its exact form is wanted.
    """

    checkpoint: Checkpoint
    file_hashes: list[str | None]
    hashes: dict[int, bytes]
    patched: bool


def compare(
    catalog: Catalog, revisions: Revisions, scanned: Scanned, parent: ObjectId | None
) -> Likeness:
    """Return how much of a checkpoint a commit already contains.

    The same weights at the same step mean the same run, whatever else differs.
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
    """Return whether a commit holds exactly these tensors, bit for bit.

    The bytes around the tensors of a file may differ; those of a state may not.
    """
    exact = [state.exact for state in commit.parts.values() if state.exact is not None]
    if scanned.patched and any(is_gone(catalog, values) for values in exact):
        return False  # this checkpoint restores the exact form
    old = catalog.schema(commit.schema)
    if scanned.checkpoint.kind == "state":
        return _has_tables(scanned, commit) and _is_state(scanned.checkpoint, old, commit)
    return _stored(old) == _stored(scanned.checkpoint.schema) and (
        _has_files(scanned, commit) or (_has_tables(scanned, commit) and bool(commit.parts))
    )


def _has_files(scanned: Scanned, commit: Commit) -> bool:
    """Return whether a commit has the same files, byte for byte."""
    files = zip(scanned.checkpoint.files, scanned.file_hashes, strict=True)
    return {f.path: f.hash for f in commit.files if f.hash} == {f.path: h for f, h in files}


def _has_tables(scanned: Scanned, commit: Commit) -> bool:
    """Return whether a commit of the same kind has the same tensor hash tables."""
    schema = scanned.checkpoint.schema
    tables = {part: _table(schema, part, scanned.hashes) for part in PARTS if schema.stored(part)}
    return commit.source == scanned.checkpoint.kind and tables == {
        part: state.exact or state.values for part, state in commit.parts.items()
    }


def _is_state(checkpoint: Checkpoint, old: Schema, commit: Commit) -> bool:
    """Return whether a commit has the same schema and file templates."""
    skeletons = [object_id(Kind.SKELETON, skeleton_of(checkpoint, f)) for f in checkpoint.files]
    return old == checkpoint.schema and [file.skeleton for file in commit.files] == skeletons


def is_gone(catalog: Catalog, exact: ObjectId) -> bool:
    """Return whether exact values have no patch, or one that is being deleted."""
    return not catalog.has_recipe(exact) or catalog.is_fading(exact)


def has_other_weights(catalog: Catalog, checkpoint: Checkpoint, base: Commit) -> bool:
    """Return whether a commit has weights with other names, types or shapes."""
    old, new = catalog.schema(base.schema), checkpoint.schema
    names = alike([info.name for info in old.tensors], [info.name for info in new.tensors])
    return _weights(old, {}) != _weights(new, names)


def _table(schema: Schema, part: str, hashes: Mapping[int, bytes]) -> ObjectId:
    """Return the id of the hash table of a part."""
    return object_id(Kind.VALUES, dump_values([hashes[n] for n in schema.stored(part)]))


def _stored(schema: Schema) -> dict[int, TensorInfo]:
    """Return the tensors that are not in file templates, by number."""
    return {number: info for number, info in enumerate(schema.tensors) if not info.inline}


def _weights(schema: Schema, names: Mapping[str, str]) -> set[tuple[str, str, tuple[int, ...]]]:
    """Return the name, type and shape of each weight; `names` maps to the names to compare."""
    infos = (schema.tensors[number] for number in schema.stored("model"))
    return {(names.get(info.name, info.name), info.dtype, info.shape) for info in infos}
