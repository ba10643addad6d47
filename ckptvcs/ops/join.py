"""DistributedCommit: one commit of several processes.

    begin    who joins takes a lease, and says what all are to code against
    code     each process its own shard (`encode/shards.py`)
    finish   tables, recipes and one exact patch a part from all shards; the commit, the branch

Nothing is in the history before `finish`: a process that dies leaves packs that gc sweeps.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from ckptvcs.checkpoint.layout import Piece, Source
from ckptvcs.checkpoint.open import Checkpoint, InputFile
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.decode.chain import ChainReader, read_slice
from ckptvcs.encode.assemble import Assembly, Encoded, StoredPlace
from ckptvcs.encode.frame_writer import PatchWriter
from ckptvcs.encode.group import Errors
from ckptvcs.encode.measure import report, report_tensors
from ckptvcs.encode.shards import Shard, ShardPlan, Stored, encode_shard
from ckptvcs.errors import CkptError, ConflictError, InvalidInputError, after
from ckptvcs.hashing import hex_hash
from ckptvcs.history.commit import PARTS, ErrorReport
from ckptvcs.history.log import LogEntry
from ckptvcs.history.schema import Schema, TensorInfo
from ckptvcs.ops.commit import Committer, SharedPatchFadedError, unchanged
from ckptvcs.ops.likeness import Scanned
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import lease


class DistributedCommit:
    """A commit that several processes make together; held by the one that joins what they code.

    gc keeps away from `begin` until the end of `finish`, of a `with`, or of the process, or until
    `abandon`.
    """

    def __init__(
        self,
        repository: Repository,
        path: str,
        *,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
        branch: str | None = None,
    ) -> None:
        """Raises InvalidInputError: a step, a metric, a message or a codec is none."""
        self._repository, self._catalog = repository, repository.catalog
        nothing = Checkpoint("directory", (), (), Schema(()), (), None, {}, {})
        config = repository.commit_config()
        self._request = Request.of(
            nothing,
            path,
            inside=True,
            message=message,
            step=step,
            metrics=metrics or {},
            spec=repository.codec_for(codec, metrics or {}, config),
            branch=branch,
        )
        self._patched = config.exact_rule.wants_patch(self._request.metrics)
        self._committer = Committer(repository, config)
        self._stack = ExitStack()
        self.abandon = weakref.finalize(self, self._stack.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def begin(self) -> ShardPlan:
        """What all processes need to code their shards.

        Raises:
            BusyError: gc is sweeping.
        """
        self._held = self._stack.enter_context(lease(self._catalog.store.backend))
        self._begun = place = self._committer.place(self._request, None)
        there = self._committer.base(place.parent) is not None
        keyframe = not there or self._committer.starts_keyframe(place.parent)
        base = place.parent if there else None
        self._ticket = ShardPlan(base, self._request.spec, keyframe, self._patched)
        return self._ticket

    def finish(self, shards: Mapping[str, Shard], files: Mapping[str, bytes]) -> LogEntry:
        """Make the commit: a directory of a file for each shard, and of these `files`.  Where that
        fails, all has to be done again.

        Raises:
            ConflictError: another writer moved the branch meanwhile.
            InvalidInputError, CorruptionError, StorageError: as `Committer.commit`.
        """
        with self:
            return self._finish(shards, files)

    def _finish(self, shards: Mapping[str, Shard], files: Mapping[str, bytes]) -> LogEntry:
        store = self._catalog.store
        store.refresh()  # other processes have written
        self._catalog.forget()
        checkpoint, stored = _join(shards, files)
        request = replace(self._request, checkpoint=checkpoint)
        hashes = [None] * len(shards) + [hex_hash(content) for content in files.values()]
        exact = {number: one.exact for number, one in stored.items()}
        made = None
        while made is None:
            scanned = Scanned(checkpoint, hashes, exact, self._patched)
            place = self._committer.place(request, scanned)
            if place.branch == self._begun.branch and place.tip != self._begun.tip:
                raise ConflictError(
                    f"another writer moved '{place.branch}' meanwhile", hint="save again"
                )
            base = self._committer.base(place.parent)
            if base is not None and place.unchanged:
                encoded = unchanged(base, patched=self._patched)
            else:
                encoded = self._encoded(checkpoint, stored, shards)
            with contextlib.suppress(SharedPatchFadedError):  # it gets one of its own
                made = self._committer.complete(request, place, base, encoded, hashes, self._held)
        with after(f"commit {made.id[:8]} was made"):
            with contextlib.suppress(CkptError):  # the next gc takes what stays
                loose = [pack for shard in shards.values() for pack in shard.loose]
                store.delete_packs(dict.fromkeys(loose, "packs"))
            return self._repository.entry(made.id, branch=made.branch)

    # -- how it is stored ------------------------------------------------------------------------

    def _encoded(
        self, checkpoint: Checkpoint, stored: Mapping[int, Stored], shards: Mapping[str, Shard]
    ) -> Encoded:
        infos = checkpoint.schema.tensors
        depths = {number: tensor.depth for number, tensor in stored.items()}
        assembly = Assembly(self._catalog, depths, patched=self._patched)
        near = {number: tensor.value for number, tensor in stored.items()}
        exact = {number: tensor.exact for number, tensor in stored.items()}
        for part in PARTS:
            row = checkpoint.schema.stored(part)

            def places(row: list[int] = row) -> list[StoredPlace]:
                return [(stored[number].bundle, stored[number].frame) for number in row]

            def patch(values: ObjectId, table: bytes, row: list[int] = row) -> int:
                frames = [(number, stored[number], depths[number] + 1) for number in row]
                return self._patch(infos, values, table, frames)

            assembly.add(part, row, (near, exact), places, patch)
        errors, reports = self._reports(infos, stored)
        return Encoded(
            assembly.parts,
            assembly.tables,
            assembly.recipes,
            max(depths.values(), default=0),
            sum(shard.data_bytes for shard in shards.values()),
            assembly.patch_bytes,
            sum(shard.nonfinite for shard in shards.values()),
            report(errors, infos),
            reports,
            assembly.shared,
        )

    def _reports(
        self, infos: tuple[TensorInfo, ...], stored: Mapping[int, Stored]
    ) -> tuple[dict[int, Errors], dict[int, ErrorReport]]:
        """Return the measured errors, and the error report of each near tensor."""
        errors = {n: tensor.errors for n, tensor in stored.items() if tensor.errors is not None}
        reports = report_tensors(errors, infos) if self._request.spec.settings else {}
        reports |= {n: tensor.known for n, tensor in stored.items() if tensor.known is not None}
        return errors, reports

    def _patch(
        self,
        infos: tuple[TensorInfo, ...],
        values: ObjectId,
        exact: bytes,
        row: list[tuple[int, Stored, int]],
    ) -> int:
        """Copy the exact patches of a part into one pack: its bytes on disk."""
        store, frames = self._catalog.store, []
        writer = PatchWriter(lambda: store.new_pack("packs"))
        try:
            for position, (number, one, depth) in enumerate(row):
                for index, data in enumerate(self._slices(infos[number], one)):
                    writer.append(number, index, (data,))
                frames.append(writer.frame(number, infos[number], (values, position), depth))
            return writer.finish(frames, exact, store.publish)
        finally:
            writer.abort()

    def _slices(self, info: TensorInfo, one: Stored) -> Iterator[bytes]:
        """The slices of a tensor's exact patch, proven; none where it is exact."""
        if one.patch is None:
            return
        if one.proof is not None:  # it is that of a commit, and has no hashes
            for _ in ChainReader(self._catalog).slices(*one.proof, info):
                pass
        bundle, number = one.patch
        frame = self._catalog.frame_at(bundle, number)
        for index in range(len(frame.slices)):
            yield read_slice(self._catalog, bundle, frame, index, unhashed_patch=True)


def encode_share(repository: Repository, ticket: ShardPlan, checkpoint: Checkpoint) -> Shard:
    """Code the share of this process in a commit of several."""
    repository.catalog.store.refresh()  # who joins may have committed meanwhile
    with repository.held_base("state") as held:
        held = MemoryBase() if held is None else held
        return encode_shard(repository.catalog, repository.bases, ticket, checkpoint, held)


class _Elsewhere(Source):
    """A file of which only what stands in no frame is here, by its offset."""

    def __init__(self, size: int, literals: Mapping[int, bytes]) -> None:
        self.size, self._literals = size, literals

    def read(self, offset: int, length: int) -> bytes:
        data = self._literals.get(offset, b"")
        if len(data) != length:
            raise InvalidInputError("a shard lacks some of its file")
        return data


def _join(
    shards: Mapping[str, Shard], files: Mapping[str, bytes]
) -> tuple[Checkpoint, dict[int, Stored]]:
    """The checkpoint that shards are together, and where its tensors are stored."""
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
        stored |= {first + number: one for number, one in shard.stored.items()}
        pieces = tuple(
            piece if piece.tensor is None else replace(piece, tensor=first + piece.tensor)
            for piece in shard.pieces
        )
        source = _Elsewhere(shard.size, shard.literals)
        joined.append(InputFile(path, source, shard.format, pieces, 0o644, 0))
    for path, content in files.items():
        piece = Piece(0, len(content))
        source = _Elsewhere(piece.size, {0: content})
        joined.append(InputFile(path, source, "raw", (piece,), 0o644, 0))
    step = next((shard.step for shard in shards.values() if shard.step is not None), None)
    schema = Schema(tuple(infos))
    return Checkpoint("directory", tuple(joined), (), schema, tuple(places), step, {}, {}), stored
