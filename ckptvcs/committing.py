"""Commit: a checkpoint -> packs, one commit object, one ref generation.

    lease        so that gc keeps away
    scan         hashes of files and tensors
    place        parent and branch (a step that is not above its parent's starts a branch, unless
                 both are the same, with the same weights)
    encode       frames into data packs
    describe     schema, skeletons, tables, recipes and the commit into one meta pack
    publish      the next generation of the branch: the only commit point

A crash anywhere before the last line leaves packs that nothing refers to, which gc sweeps.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.matching import alike
from ckptvcs.checkpoint.notes import unknown_floats
from ckptvcs.checkpoint.open import Checkpoint
from ckptvcs.checkpoint.skeleton import skeleton_of
from ckptvcs.codec.spec import NearSpec
from ckptvcs.config import Config
from ckptvcs.decode.base_cache import HeldBase
from ckptvcs.encode.attempt import Attempt, within_bounds
from ckptvcs.encode.encoder import Encoded, Encoder
from ckptvcs.encode.source import Progress, scan
from ckptvcs.errors import CkptError, CorruptionError, InvalidInputError, MissingObjectError, after
from ckptvcs.gc.fading import Fader, Patch
from ckptvcs.gc.retention import ExactRule
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import (  # fmt: skip
    PARTS,
    Commit,
    FileEntry,
    PartState,
    dump_commit,
    dump_errors,
    load_commit,
)
from ckptvcs.history.reachability import mark, require_packs
from ckptvcs.history.recipe import dump_let_go, dump_recipe, dump_values
from ckptvcs.history.refs import HEAD, Generation, Move, Refs, check_name
from ckptvcs.history.revision import Revisions
from ckptvcs.history.schema import Schema, TensorInfo, dump_schema, load_schema  # fmt: skip
from ckptvcs.provenance import code_commit, user
from ckptvcs.request import Request, find_step
from ckptvcs.store.ids import Kind, ObjectId, object_id
from ckptvcs.store.leases import check_lease, lease
from ckptvcs.store.pack import PackWriter

Announce = Callable[[Move], None]


def silent(_: Move) -> None:
    """Nobody needs to know."""


@dataclass(frozen=True)
class Result:
    """A commit that is in the history now."""

    id: ObjectId
    commit: Commit
    stored_bytes: int
    branch: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a commit goes: its step, the branch and its newest generation, and the parent."""

    step: int | None
    branch: str
    tip: Generation | None
    parent: ObjectId | None
    moves_head: bool
    unchanged: bool
    notes: tuple[str, ...]


class SharedPatchFadedError(Exception):
    """Another writer lets a patch go that this commit was to share."""


class Committer:
    """Makes commits in one repository."""

    def __init__(
        self, catalog: Catalog, refs: Refs, cache: Path, config: Config, progress: Progress,
        held: HeldBase | None = None, announce: Announce = silent, *,
        rule: Callable[[], ExactRule],
    ) -> None:  # fmt: skip
        """`announce` is called just before a branch moves to a commit that is made; `rule` says
        what stays exact when it is asked, `config` said so when the commit began.
        """
        self._catalog, self._refs, self._cache = catalog, refs, cache
        self._config, self._progress, self._held = config, progress, held
        self._announce, self._rule = announce, rule
        self._move: Move | None = None  # the one that makes the commit
        self._revisions = Revisions(catalog, refs)

    def commit(self, request: Request) -> Result:
        """Add one commit to the history.

        Raises:
            InvalidInputError: the checkpoint changed while it was read.
            ConflictError: another writer moved the branch meanwhile.
            BusyError: gc is sweeping.
            CorruptionError: what it would stand on is missing or damaged.
            StorageError: the disk is full, or fails.
        """
        rebuilt = False
        while True:
            try:
                with after(self._made):
                    return self._commit(request)
            except SharedPatchFadedError:
                continue  # it gets one of its own
            except MissingObjectError:  # the index may be older than the packs, after a power cut
                if rebuilt:
                    raise
                rebuilt = True
                self._catalog.store.rebuild()
                self._catalog.forget()

    def _commit(self, request: Request) -> Result:
        with lease(self._catalog.store.backend) as held:
            checkpoint = request.checkpoint
            patched = self._config.exact_rule.wants_patch(request.metrics)
            near = isinstance(request.spec.settings, NearSpec)
            file_hashes, hashes = scan(checkpoint, self._progress, stay=near and not patched)
            place = self.place(request, file_hashes, hashes)
            base = self.base(place.parent)
            if base is not None and place.unchanged:
                encoded = unchanged(base, patched=patched)
            else:
                keyframe = (
                    base is None
                    or self._has_other_weights(checkpoint, base)
                    or self.starts_keyframe(place.parent)
                )
                encoded = self._encode(request, base, hashes, keyframe=keyframe, patched=patched)
            return self.complete(request, place, encoded, file_hashes, held)

    def complete(
        self, request: Request, place: Place, encoded: Encoded, file_hashes: list[str | None],
        held: str,
    ) -> Result:  # fmt: skip
        """Make a commit of what is stored, and move its branch; `held` names the lease that was
        held all the time.

        Raises:
            SharedPatchFadedError: it shares an exact patch that is let go.
            ConflictError, InvalidInputError, CorruptionError, StorageError: as in `commit`.
        """
        store = self._catalog.store
        pack = store.new_pack("meta")
        try:
            commit = self._describe(pack, request, place, encoded, file_hashes)
            content = dump_commit(commit)
            load_commit(ObjectId(""), content)  # one that cannot be read would lock its branch
            name = pack.add(Kind.COMMIT, content)
            fading = self._fading(name, commit, is_head=place.moves_head)
            for record in self._fader().record(fading, commit.time):
                pack.add(Kind.RECORD, dump_let_go(record))
            request.checkpoint.check_unchanged()
            info = store.publish(pack)
        finally:
            pack.abort()
        gone = self._catalog.dropped()
        require_packs(self._catalog, mark(self._catalog, {name: commit}, gone))
        store.backend.settle_seen()  # those who wrote what it stands on may have been killed
        # Who lets a patch go says so first, and looks then who shares it: one sees the other.
        if any(map(self._is_gone, encoded.shared)):
            raise SharedPatchFadedError
        check_lease(store.backend, held)
        notes = [*place.notes, *request.checkpoint.notes, *encoded.notes]
        if request.spec.settings is not None and not self._has_schema(place.parent, commit.schema):
            notes += unknown_floats(request.checkpoint.schema, request.checkpoint.size_bytes)
        self._publish(place, name, commit)
        try:
            check_lease(store.backend, held)
        except CkptError:
            from ckptvcs.history.reflog import take_back  # noqa: PLC0415  hardly ever needed

            if take_back(self._catalog, self._refs, place.branch, place.tip, name):
                raise
        # It is in the history now: what goes wrong from here on, gc makes good.
        with contextlib.suppress(CkptError, OSError, MemoryError):
            self._fade(fading, name, held, is_head=place.moves_head)
        self._catalog.forget_commits()
        return Result(
            name, commit, encoded.data_bytes + info.size_bytes, place.branch, tuple(notes)
        )

    def _has_schema(self, parent: ObjectId | None, schema: ObjectId) -> bool:
        """Whether the parent has the same tensors, of which all has been said."""
        return parent is not None and self._catalog.commit(parent).schema == schema

    def _fader(self) -> Fader:
        return Fader(self._catalog, self._refs, self._rule())

    def _fade(self, recorded: list[Patch], name: ObjectId, held: str, *, is_head: bool) -> None:
        """Delete patches, but for those that a tag, a pin or a setting has come to keep meanwhile;
        who pins waits for this process as long as it holds its lease.
        """
        fader = self._fader()
        still = {patch.pack for patch in fader.after(name, is_head=is_head)} if recorded else set()
        check_lease(self._catalog.store.backend, held)
        fader.delete(patch for patch in recorded if patch.pack in still)

    def base(self, parent: ObjectId | None) -> Commit | None:
        """What a commit can be coded against: its parent, as far as that is still there."""
        if parent is None or parent in self._catalog.dropped().commits:
            return None
        return self._catalog.commit(parent)

    def _fading(self, name: ObjectId, commit: Commit, *, is_head: bool) -> list[Patch]:
        """The exact patches to let go once a commit is in the history: none, if it is the first one
        with values that are not finite.
        """
        (parent,) = commit.parents or (None,)
        before = self._catalog.commit(parent).nonfinite if parent else 0
        if commit.nonfinite > before:
            return []
        return self._fader().after(parent, (name, commit), is_head=is_head)

    # -- where it goes ---------------------------------------------------------------------------

    def place(
        self, request: Request, file_hashes: list[str | None], hashes: dict[int, bytes] | None
    ) -> Place:
        """Where a commit goes; without `hashes` as if it held just what its parent holds."""
        step = find_step(request)
        head = self._refs.read(HEAD)
        following = head.branch if head else "main"
        wanted = check_name(request.branch, "branch") if request.branch else following
        tip = self._refs.read(f"heads/{wanted}") if wanted else None
        notes: list[str] = []
        parent: ObjectId | None = None
        if tip is not None and tip.commit is not None:
            parent = tip.commit
        elif head is not None and (request.branch or not head.branch):
            parent = self._tip(head.branch) if head.branch else head.commit
        branch = wanted
        if branch is None:
            branch, tip = self._free_name(self._last_branch()), None
            notes.append(f"HEAD was at an older commit: started branch '{branch}'")
        unchanged = hashes is None or self._same(request, parent, file_hashes, hashes)
        above = None if parent is None else self._step_of(parent)
        same_run = unchanged or self._same_weights(request, parent, hashes or {})
        again = step == above and same_run
        if step is not None and above is not None and step <= above and not again:
            parent = self._below(parent, step)
            branch, tip = self._free_name(branch), None
            unchanged = hashes is None or self._same(request, parent, file_hashes, hashes)
            origin = f"at step {self._step_of(parent)}" if parent else "from nothing"
            notes.append(
                f"step {step} is not above step {above}: started branch '{branch}' {origin}"
            )
        stays = request.head_stays and branch != wanted
        moves_head = request.branch is None or (head is not None and head.branch == wanted)
        return Place(
            step, branch, tip, parent, moves_head and not stays, unchanged, tuple(notes)
        )  # fmt: skip

    def _tip(self, branch: str) -> ObjectId | None:
        state = self._refs.read(f"heads/{branch}")
        return state.commit if state else None

    def _last_branch(self) -> str:
        return next((g.branch for g in self._refs.readable(HEAD) if g.branch), "main")

    def _free_name(self, name: str) -> str:
        stem = re.sub(r"-[0-9]+\Z", "", name)
        taken = set(self._refs.names("heads"))
        number = 2
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"

    def _step_of(self, name: ObjectId) -> int | None:
        """The step of a commit, or of its nearest ancestor that has one."""
        return next((c.step for _, c in self._catalog.line(name) if c.step is not None), None)

    def _below(self, name: ObjectId | None, step: int) -> ObjectId | None:
        """The newest commit on a line whose step is lower."""
        for found, commit in self._catalog.line(name):
            if commit.step is not None and commit.step < step:
                return found
        return None

    def _same(
        self, request: Request, parent: ObjectId | None, file_hashes: list[str | None],
        hashes: dict[int, bytes],
    ) -> bool:  # fmt: skip
        """Whether a commit holds just the tensors, bit for bit, that are to be committed; of files
        what stands around them may be other, of a state nothing.
        """
        if parent is None or not self._revisions.whole(parent):
            return False
        commit, checkpoint = self._catalog.commit(parent), request.checkpoint
        faded = any(map(self.is_faded, commit.parts.values()))
        if faded and self._config.exact_rule.wants_patch(request.metrics):
            return False  # here is the exact form again
        old, schema = self._catalog.schema(commit.schema), checkpoint.schema
        if checkpoint.kind != "state":
            held = {file.path: file.hash for file in commit.files if file.hash}
            new = {f.path: h for f, h in zip(checkpoint.files, file_hashes, strict=True)}
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

    def _same_weights(
        self, request: Request, parent: ObjectId | None, hashes: dict[int, bytes]
    ) -> bool:
        """Whether a commit has just the weights that are to be committed: at the same step it is
        then of the same run, whatever else is kept of that.
        """
        schema = request.checkpoint.schema
        weights = self._catalog.commit(parent).parts.get("model") if parent else None
        if weights is None or not schema.stored("model"):
            return False
        return _table(schema, "model", hashes) == (weights.exact or weights.values)

    def is_faded(self, state: PartState) -> bool:
        """Whether a part that is near has no exact patch any more, or not for long."""
        return state.exact is not None and self._is_gone(state.exact)

    def _is_gone(self, exact: ObjectId) -> bool:
        """Whether there is no patch for exact values, or one that somebody lets go."""
        return not self._catalog.has_recipe(exact) or self._catalog.is_fading(exact)

    # -- how it is stored ------------------------------------------------------------------------

    def _encode(
        self, request: Request, base: Commit | None, hashes: dict[int, bytes], *, keyframe: bool,
        patched: bool,
    ) -> Encoded:  # fmt: skip
        checkpoint = request.checkpoint
        held = self._held if checkpoint.kind == "state" else None

        def encode(attempt: Attempt) -> Encoded:
            return Encoder(
                self._catalog, self._cache, attempt, base, checkpoint, dict(hashes),
                progress=self._progress, held=held,
            ).encode()  # fmt: skip

        first = Attempt.first(request.spec, keyframe=keyframe, patched=patched)
        return within_bounds(first, encode)

    def _has_other_weights(self, checkpoint: Checkpoint, base: Commit) -> bool:
        old, new = self._catalog.schema(base.schema), checkpoint.schema
        names = alike([info.name for info in old.tensors], [info.name for info in new.tensors])
        return _weights(old, {}) != _weights(new, names)

    def starts_keyframe(self, parent: ObjectId | None) -> bool:
        """Whether the chain that ends at `parent` is as deep, or as heavy, as is allowed."""
        deltas = 0
        for _, commit in self._catalog.ancestors(parent):
            if commit.kind == "keyframe":
                return deltas > self._config.keyframe_bytes * commit.data_bytes
            if commit.depth >= self._config.keyframe_depth:
                return True
            deltas += commit.data_bytes
        return True

    def _describe(
        self, pack: PackWriter, request: Request, place: Place, encoded: Encoded,
        file_hashes: list[str | None],
    ) -> Commit:  # fmt: skip
        """Put what the commit refers to into the meta pack; the commit itself."""
        checkpoint, base = request.checkpoint, self.base(place.parent)
        described = dump_schema(checkpoint.schema)
        try:
            load_schema(described)  # a schema that cannot be read would lock its branch
        except CorruptionError as error:
            raise InvalidInputError(
                f"the structure of this checkpoint makes no sense: {error.message}",
                hint="commit it with --raw",
            ) from error
        schema = self._put(pack, Kind.SCHEMA, described)
        for table in encoded.tables.values():
            self._put(pack, Kind.VALUES, table)
        for recipe in encoded.recipes:
            self._put(pack, Kind.RECIPE, dump_recipe(recipe))
        old = {file.path: file.skeleton for file in base.files} if base else {}
        same = alike([f"{path}:" for path in old], [f"{file.path}:" for file in checkpoint.files])
        if len(old) == len(checkpoint.files) == 1:  # a.pt, then b.pt
            same = {f"{checkpoint.files[0].path}:": f"{path}:" for path in old}
        files = [
            FileEntry(
                file.path, file.source.size, digest, file.mode, file.mtime_ns, file.format,
                self._put(
                    pack, Kind.SKELETON, skeleton_of(checkpoint, file),
                    old.get(same.get(f"{file.path}:", "")[:-1]),
                ),
            )
            for file, digest in zip(checkpoint.files, file_hashes, strict=True)
        ]  # fmt: skip
        files += [
            FileEntry(link.path, 0, None, link.mode, link.mtime_ns, "link", None, link.target)
            for link in checkpoint.links
        ]
        errors = base.errors if base is not None and place.unchanged else None
        if encoded.errors:
            errors = self._put(pack, Kind.ERRORS, dump_errors(encoded.errors))
        keyframe = not encoded.depth and not place.unchanged
        return Commit(
            parents=(place.parent,) if place.parent else (), time=now(), step=place.step,
            message=request.message, metrics=dict(request.metrics), codec=request.spec.name,
            kind="keyframe" if keyframe else "delta", depth=encoded.depth,
            raw_bytes=checkpoint.size_bytes, data_bytes=encoded.data_bytes,
            patch_bytes=encoded.patch_bytes, nonfinite=encoded.nonfinite,
            source=checkpoint.kind, path=request.path, inside=request.inside, schema=schema,
            parts=encoded.parts, files=tuple(files), error=encoded.error,
            errors=errors, host=socket.gethostname(), user=user(), code=code_commit(),
        )  # fmt: skip

    def _put(
        self, pack: PackWriter, kind: Kind, content: bytes, base: ObjectId | None = None
    ) -> ObjectId:
        """Add an object unless the store, or this pack, has it."""
        name = object_id(kind, content)
        if name in pack or self._catalog.store.lasts(name):
            return name
        return pack.add(kind, content, self._root(base, kind) if base else None)

    def _root(self, base: ObjectId, kind: Kind) -> tuple[ObjectId, bytes]:
        """The object that `base` itself stands on, so that no object is two links deep."""
        entry = self._catalog.store.places(base)[0].entry
        root = entry.base or base
        return root, self._catalog.store.get(root, kind)

    def _publish(self, place: Place, name: ObjectId, commit: Commit) -> None:
        head = self._refs.read(HEAD)
        takes_head = place.moves_head and (head is None or head.branch != place.branch)
        move = Move(name, place.branch, place.tip, head, takes_head, commit.time)
        self._announce(move)
        self._move = move
        with after(self._made):
            self._refs.make(move)

    def _made(self) -> str:
        """What is to be said of a commit that is in the history, whatever goes wrong from then on:
        a ref is seen before it is known to be durable, and HEAD follows after that.
        """
        if self._move is None:
            return ""
        try:
            made = "was made" if self._refs.has(self._move) else ""
        except (CkptError, OSError, MemoryError):
            made = "may have been made"
        return made and f"commit {self._move.commit[:8]} {made}"


def unchanged(base: Commit, *, patched: bool) -> Encoded:
    """What is stored for a checkpoint that a commit holds already; its exact patches are shared."""
    shared = [state.exact for state in base.parts.values() if state.exact]
    return Encoded(
        dict(base.parts), {}, [], base.depth, 0, 0, base.nonfinite, base.error, {},
        shared if patched else [],
    )  # fmt: skip


def _table(schema: Schema, part: str, hashes: dict[int, bytes]) -> ObjectId:
    """The table of the values of a part."""
    return object_id(Kind.VALUES, dump_values([hashes[n] for n in schema.stored(part)]))


def _stored(schema: Schema) -> dict[int, TensorInfo]:
    """The tensors that do not stand in skeletons, by position."""
    return {number: info for number, info in enumerate(schema.tensors) if not info.inline}


def _weights(
    schema: Schema, names: Mapping[str, str]
) -> set[tuple[str, str, tuple[int, ...]]]:  # fmt: skip
    """What the weights are called, or others call them, and how large they are."""
    infos = (schema.tensors[number] for number in schema.stored("model"))
    return {(names.get(info.name, info.name), info.dtype, info.shape) for info in infos}
