"""DistributedCommit: one commit of several processes.

    begin     the coordinator takes a lease, and returns the plan for all processes
    encode    each process encodes its own shard (`encode/shards.py`)
    finish    the coordinator joins the shards: hash tables, recipes, one exact patch for each part,
              the commit, the branch

`finish` is the only commit point: if a process dies before, gc deletes the packs that it leaves.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Self

from ckptvcs.checkpoint.layout import Piece, Source
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.decode.chain import ChainReader
from ckptvcs.decode.stored_slice import read_slice
from ckptvcs.encode.assemble import Encoded, assemble
from ckptvcs.encode.frame_writer import PatchWriter
from ckptvcs.encode.measure import report, report_tensors
from ckptvcs.encode.shards import Shard, ShardPlan, Stored, encode_shard
from ckptvcs.errors import CkptError, ConflictError, InvalidInputError, after
from ckptvcs.hashing import hex_hash
from ckptvcs.history.commit import PARTS
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import Schema, TensorInfo
from ckptvcs.ops.commit import Committer, SharedPatchFadedError
from ckptvcs.ops.likeness import Scanned
from ckptvcs.ops.provenance import capture_beside
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import lease


class DistributedCommit:
    """The coordinator's side of a commit that several processes make together.

    A lease keeps gc from sweeping after `begin`, until `finish` or `abandon` returns, the `with`
    block ends, or the process ends.
    """

    def __init__(self, repository: Repository, request: Request) -> None:
        """Prepare a commit; `request` has no checkpoint yet.

        Raises:
            InvalidInputError: The codec is not known.
        """
        self._repository, self._catalog = repository, repository.catalog
        origin = capture_beside(repository.commit_config())
        self._committer = Committer(repository, replace(request, origin=origin))
        self._stack = ExitStack()
        self.abandon = weakref.finalize(self, self._stack.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def begin(self) -> ShardPlan:
        """Take the lease, and return the plan by which all processes encode their shards.

        Raises:
            BusyError: gc is sweeping.
        """
        self._lease = self._stack.enter_context(lease(self._catalog.store.backend))
        self._begun = self._committer.place(None)
        parent = self._begun.parent
        base = None if self._committer.base(parent) is None else parent
        keyframe = base is None or self._committer.starts_keyframe(parent)
        return ShardPlan(base, self._committer.spec, keyframe, self._committer.patched)

    def finish(self, shards: Mapping[str, Shard], files: Mapping[str, bytes]) -> LogEntry:
        """Commit a directory with one file for each shard; after an error, begin a new commit.

        Args:
            shards: The shard of each process, by file name.
            files: The content of further files, by name.

        Raises:
            ConflictError: Another writer moved the branch meanwhile.
            InvalidInputError, CorruptionError, StorageError: As for `Repo.commit_path`.
        """
        with self:
            return self._finish(shards, files)

    def _finish(self, shards: Mapping[str, Shard], files: Mapping[str, bytes]) -> LogEntry:
        store = self._catalog.store
        self._catalog.reload()  # other processes have written packs
        checkpoint, stored = _join(shards, files)
        self._committer.request = replace(self._committer.request, checkpoint=checkpoint)
        hashes = [None] * len(shards) + [hex_hash(content) for content in files.values()]
        exact = {number: tensor.exact for number, tensor in stored.items()}
        result = None
        while result is None:
            scanned = Scanned(checkpoint, hashes, exact, self._committer.patched)
            place = self._committer.place(scanned)
            if place.branch == self._begun.branch and place.tip != self._begun.tip:
                raise ConflictError(
                    f"another writer moved '{place.branch}' meanwhile", hint="save again"
                )
            with contextlib.suppress(SharedPatchFadedError):  # the next round writes a new patch
                result = self._committer.complete(
                    place, lambda _: self._encoded(checkpoint, stored, shards), hashes, self._lease
                )
        with after(f"commit {result.id[:8]} was made"):
            with contextlib.suppress(CkptError):  # the next gc deletes the remaining packs
                loose = [pack for shard in shards.values() for pack in shard.loose]
                store.delete_packs(dict.fromkeys(loose, "packs"))
            return self._repository.entry(result.id, branch=result.branch)

    def _encoded(
        self, checkpoint: Checkpoint, stored: Mapping[int, Stored], shards: Mapping[str, Shard]
    ) -> Encoded:
        schema = checkpoint.schema
        rows = {part: schema.stored(part) for part in PARTS}
        patch = partial(self._patch, schema, stored) if self._committer.patched else None
        encoded = assemble(self._catalog, stored, rows, lambda _: None, patch)
        encoded.data_bytes = sum(shard.data_bytes for shard in shards.values())
        encoded.nonfinite = sum(shard.nonfinite for shard in shards.values())
        errors = {n: tensor.errors for n, tensor in stored.items() if tensor.errors is not None}
        encoded.error = report(errors, schema.tensors)
        if self._committer.spec.settings:
            encoded.errors = report_tensors(errors, schema.tensors)
        encoded.errors |= {n: t.known for n, t in stored.items() if t.known is not None}
        return encoded

    def _patch(
        self,
        schema: Schema,
        stored: Mapping[int, Stored],
        part: str,
        values: ObjectId,
        exact: bytes,
        depths: Mapping[int, int],
    ) -> int:
        """Copy the exact patches of a part into one pack, and return its size in bytes."""
        frames, writer = [], PatchWriter(self._catalog.store)
        try:
            for position, number in enumerate(schema.stored(part)):
                info = schema.tensors[number]
                for index, data in enumerate(self._slices(info, stored[number])):
                    writer.append([number], index, (data,))
                frames.append(writer.frame(number, info, (values, position), depths[number] + 1))
            return writer.finish(frames, exact)
        finally:
            writer.abort()

    def _slices(self, info: TensorInfo, tensor: Stored) -> Iterator[bytes]:
        """Yield the verified slices of a tensor's exact patch; none if the tensor is exact."""
        if tensor.patch is None:
            return
        if tensor.proof is not None:  # a published patch has no slice hashes: decode the tensor
            for _ in ChainReader(self._catalog).slices(*tensor.proof, info):
                pass
        bundle, number = tensor.patch
        frame = self._catalog.frame_at(bundle, number)
        for index in range(len(frame.slices)):
            yield read_slice(self._catalog, bundle, frame, index, unhashed_patch=True)


def encode_share(repository: Repository, plan: ShardPlan, checkpoint: Checkpoint) -> Shard:
    """Encode the shard of this process for a distributed commit."""
    repository.catalog.store.refresh()  # the coordinator may have committed meanwhile
    with repository.held_base("state") as held:
        held = MemoryBase() if held is None else held
        return encode_shard(repository.catalog, repository.bases, plan, checkpoint, held)


class _Literals(Source):
    """A file without its stored tensors: the bytes between them, by offset."""

    def __init__(self, size: int, literals: Mapping[int, bytes]) -> None:
        self.size, self._literals = size, literals

    def read(self, offset: int, length: int) -> bytes:
        data = self._literals.get(offset, b"")
        if len(data) != length:
            raise InvalidInputError(f"a shard lacks {length} bytes at offset {offset} of its file")
        return data


def _join(
    shards: Mapping[str, Shard], files: Mapping[str, bytes]
) -> tuple[Checkpoint, dict[int, Stored]]:
    """Return the checkpoint of all shards, and its stored tensors by position in its schema."""
    infos: list[TensorInfo] = []
    places: list[tuple[int, int]] = []
    stored: dict[int, Stored] = {}
    joined: list[InputFile] = []
    for path, shard in shards.items():
        first = len(infos)
        infos += [
            info if info.pair is None else replace(info, pair=info.pair + first)
            for info in shard.schema.tensors
        ]
        places += [(len(joined), 0)] * len(shard.schema.tensors)
        stored |= {first + number: tensor for number, tensor in shard.stored.items()}
        pieces = tuple(
            piece if piece.tensor is None else replace(piece, tensor=first + piece.tensor)
            for piece in shard.pieces
        )
        source = _Literals(shard.size, shard.literals)
        joined.append(InputFile(path, source, shard.format, pieces))
    for path, content in files.items():
        piece = Piece(0, len(content))
        source = _Literals(piece.size, {0: content})
        joined.append(InputFile(path, source, "raw", (piece,)))
    step = next((shard.step for shard in shards.values() if shard.step is not None), None)
    schema = Schema(tuple(infos))
    return Checkpoint("directory", tuple(joined), (), schema, tuple(places), step, {}, {}), stored
