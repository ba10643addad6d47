"""Write a commit and its schema, file templates, hash tables and recipes into a meta pack."""

from __future__ import annotations

import socket
from contextlib import suppress

from ckptvcs.checkpoint.matching import alike
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.skeleton import skeleton_of
from ckptvcs.encode.assemble import Encoded
from ckptvcs.errors import CorruptionError, InvalidInputError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.commit import Commit, FileEntry, dump_commit, dump_errors, load_commit
from ckptvcs.history.format_file import raise_flags
from ckptvcs.history.provenance import Provenance, dump_provenance
from ckptvcs.history.recipe import dump_recipe
from ckptvcs.history.schema import dump_schema, load_schema
from ckptvcs.ops.placement import Place
from ckptvcs.ops.provenance import code_commit, user
from ckptvcs.ops.request import Request
from ckptvcs.store.ids import Kind, ObjectId, object_id
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.pack import PackWriter


class Description:
    """Adds one commit, and the objects that it refers to, to a meta pack."""

    def __init__(self, store: ObjectStore, pack: PackWriter, codec: str) -> None:
        self._store, self._pack, self._codec = store, pack, codec

    def add(
        self,
        request: Request,
        place: Place,
        base: Commit | None,
        encoded: Encoded,
        file_hashes: list[str | None],
    ) -> tuple[ObjectId, Commit]:
        """Add a commit and the objects that it refers to, except those in the store."""
        checkpoint = request.checkpoint
        schema = self._put(Kind.SCHEMA, _described(checkpoint))
        for table in encoded.tables.values():
            self._put(Kind.VALUES, table)
        for recipe in encoded.recipes:
            self._put(Kind.RECIPE, dump_recipe(recipe))
        files = self._files(checkpoint, base, file_hashes)
        errors = base.errors if base is not None and place.unchanged else None
        if encoded.errors:
            errors = self._put(Kind.ERRORS, dump_errors(encoded.errors))
        provenance = request.provenance()
        keyframe = not encoded.depth and not place.unchanged
        commit = Commit(
            parents=(place.parent,) if place.parent else (),
            time=now(),
            step=place.step,
            message=request.message,
            metrics=dict(request.metrics),
            codec=self._codec,
            kind="keyframe" if keyframe else "delta",
            depth=encoded.depth,
            raw_bytes=checkpoint.size_bytes,
            data_bytes=encoded.data_bytes,
            patch_bytes=encoded.patch_bytes,
            nonfinite=encoded.nonfinite,
            source=checkpoint.kind,
            path=request.path,
            inside=request.inside,
            schema=schema,
            parts=encoded.parts,
            files=files,
            error=encoded.error,
            errors=errors,
            host=socket.gethostname(),
            user=user(),
            code=code_commit() if provenance is None else provenance.code_commit,
            provenance=self._put_provenance(provenance, base),
        )
        content = dump_commit(commit)
        load_commit(ObjectId(""), content)  # an unreadable commit would lock its branch
        return self._pack.add(Kind.COMMIT, content), commit

    def _put_provenance(
        self, provenance: Provenance | None, base: Commit | None
    ) -> ObjectId | None:
        """Add the provenance as a change of that of the base."""
        if provenance is None:
            return None
        content = dump_provenance(provenance)
        name = object_id(Kind.PROVENANCE, content)
        if not self._store.lasts(name):
            raise_flags(self._store.backend, "read", "provenance")
            with suppress(CorruptionError):  # that of the base may be lost
                return self._put(Kind.PROVENANCE, content, base.provenance if base else None)
        return self._put(Kind.PROVENANCE, content)

    def _files(
        self, checkpoint: Checkpoint, base: Commit | None, file_hashes: list[str | None]
    ) -> tuple[FileEntry, ...]:
        """Add the file templates as changes of the parent's, and return the files and links."""
        old = {file.path: file.skeleton for file in base.files} if base else {}
        same = alike([f"{path}:" for path in old], [f"{file.path}:" for file in checkpoint.files])
        if len(old) == len(checkpoint.files) == 1:  # a.pt, then b.pt
            same = {f"{checkpoint.files[0].path}:": f"{path}:" for path in old}
        files = [
            FileEntry(
                file.path,
                file.source.size,
                digest,
                file.source.mode,
                file.source.mtime_ns,
                file.format,
                self._put(
                    Kind.SKELETON,
                    skeleton_of(checkpoint, file),
                    old.get(same.get(f"{file.path}:", "")[:-1]),
                ),
            )
            for file, digest in zip(checkpoint.files, file_hashes, strict=True)
        ]
        links = [
            FileEntry(link.path, 0, None, link.mode, link.mtime_ns, "link", None, link.target)
            for link in checkpoint.links
        ]
        return (*files, *links)

    def _put(self, kind: Kind, content: bytes, base: ObjectId | None = None) -> ObjectId:
        """Add an object, unless the store or this pack has it."""
        name = object_id(kind, content)
        if name in self._pack or self._store.lasts(name):
            return name
        return self._pack.add(kind, content, self._root(base, kind) if base else None)

    def _root(self, base: ObjectId, kind: Kind) -> tuple[ObjectId, bytes]:
        """Return the base of `base`, otherwise `base`, so that no object is two links deep."""
        root = self._store.places(base)[0].entry.base or base
        return root, self._store.get(root, kind)


def _described(checkpoint: Checkpoint) -> bytes:
    schema = dump_schema(checkpoint.schema)
    try:
        load_schema(schema)  # an unreadable schema would lock its branch
    except CorruptionError as error:
        raise InvalidInputError(
            f"invalid checkpoint structure: {error.message}", hint="commit it with --raw"
        ) from error
    return schema
