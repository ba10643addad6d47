"""Proof: one commit restored to nowhere, from what the store holds of it.

What the cache has of the commit itself is not looked at: a proof that read the weights which were
put there while they were coded would not see that their frames cannot be read.  Those of its parent
are taken from there, against their hashes, so that a line that is proven commit after commit has
each of its frames read once.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ckptvcs.decode.base_cache import materialised
from ckptvcs.decode.chain import Materialised
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import CorruptionError, MissingObjectError
from ckptvcs.files.names import safe_path
from ckptvcs.history.catalog import Catalog
from ckptvcs.parallel import Progress
from ckptvcs.store.ids import ObjectId


def prove(catalog: Catalog, cache: Path, name: ObjectId, bound: float, progress: Progress) -> bool:
    """Restore a commit in the form that it has now; whether that is exact.

    Exact: each file has the hash that was committed.  Near: each tensor has the hash that was
    recorded, each file opens as what it was, and the relative error of the weights is within
    `bound` (0: whatever it is).

    Raises:
        CorruptionError: it is not so.
        NotFoundError: the commit, or a part of it, was dropped.
    """
    restorer = Restorer(catalog, name, cache=cache, materials=_of_parent(catalog, cache, name).get)
    for file in restorer.commit.files:
        safe_path(file.path)  # a checkout refuses what leaves its target, originals or not
        if file.skeleton is None:
            continue
        digest = restorer.write_file(file, lambda _: None, progress)
        if restorer.exact and digest != file.hash:
            raise CorruptionError(f"{file.path} does not come back as it was")
        layout, numbers = restorer.layout(file)
        if layout.format != file.format or -1 in numbers:
            raise CorruptionError(f"{file.path} comes back as no {file.format} file")
    error = restorer.commit.error.weight_rel
    if not restorer.exact and bound and not error <= bound:
        raise CorruptionError(f"weights are off by {error:.2g}, more than {bound:.2g}")
    return restorer.exact


def _of_parent(
    catalog: Catalog, cache: Path, name: ObjectId
) -> dict[ObjectId, Materialised | None]:
    """The weights of a commit's parent, if the cache has them."""
    commit = catalog.commit(name)
    own = commit.parts.get("model")
    for parent in commit.parents[:1]:
        with contextlib.suppress(MissingObjectError):  # gc may have swept it
            above = catalog.commit(parent)
            state, schema = above.parts.get("model"), catalog.schema(above.schema)
            if state is not None and (own is None or state.values != own.values):
                infos = [schema.tensors[number] for number in schema.stored("model")]
                hashes = catalog.all_values(state.values, len(infos))
                return {state.values: materialised(cache, None, state.values, infos, hashes)}
    return {}
