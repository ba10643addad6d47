"""Commit: a checkpoint -> packs, one commit object, one version of a branch.

    lease        so that gc keeps away
    scan         hashes of files and tensors
    place        branch and parent (`ops/placement.py`)
    encode       tensors into data packs, again and finer while a bound does not hold
    describe     schema, skeletons, hash tables, recipes and the commit into one meta pack
    publish      the next version of the branch: the only commit point
    fade         exact patches that no rule keeps any more are deleted

A crash anywhere before `publish` leaves packs that nothing refers to, which gc sweeps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.notes import unknown_floats
from ckptvcs.checkpoint.open import Checkpoint, open_checkpoint
from ckptvcs.checkpoint.roles import Names
from ckptvcs.codec.spec import NearSpec
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.encode.assemble import Encoded
from ckptvcs.encode.encoder import Encoder
from ckptvcs.encode.planner import Attempt, within_bounds
from ckptvcs.encode.source import scan
from ckptvcs.errors import CkptError, InvalidInputError, MissingObjectError, after
from ckptvcs.gc.fading import Fader, Patch
from ckptvcs.history.commit import Commit
from ckptvcs.history.reachability import mark, require_packs
from ckptvcs.history.recipe import dump_drop_record
from ckptvcs.history.refs import HEAD, Move, check_name
from ckptvcs.ops.config import Config
from ckptvcs.ops.describe import Description
from ckptvcs.ops.likeness import Scanned, compare, has_other_weights, is_gone
from ckptvcs.ops.placement import Head, Likeness, Place, Situation, decide
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request, find_step
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.leases import check_lease, lease
from ckptvcs.store.reserve import keep_reserve

Announce = Callable[[Move], None]


def silent(_: Move) -> None:
    """Nobody needs to know."""


@dataclass(frozen=True)
class CommitResult:
    """A new commit.

    Attributes:
        id: The id of the commit.
        commit: The commit object.
        stored_bytes: The bytes that the commit added to the repository.
        branch: The branch of the commit.
        notes: Warnings for the user, such as a branch that was started.
    """

    id: ObjectId
    commit: Commit
    stored_bytes: int
    branch: str
    notes: tuple[str, ...]


class SharedPatchFadedError(Exception):
    """Another writer lets a patch go that this commit was to share."""


def commit_path(
    repository: Repository,
    path: str | os.PathLike[str],
    *,
    message: str,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    codec: str | None = None,
    branch: str | None = None,
    raw: bool = False,
    names: Names | None = None,
    files: Sequence[str] = (),
    head_stays: bool = False,
    progress: Progress = quiet,
) -> CommitResult:
    """Commit a checkpoint file or a directory of files; see `Repo.commit_path`.

    Raises:
        NotFoundError, InvalidInputError: there is no complete checkpoint at `path`.
        ConflictError: another writer moved the branch meanwhile.
    """
    path, skip = Path(path), real_path(repository.folder)
    if real_path(path).is_relative_to(skip):
        raise InvalidInputError(f"{path} is part of the repository itself")
    name, inside = repository.naming(path)
    checkpoint = open_checkpoint(path, raw=raw, skip=skip, names=names, only=files)
    return commit_checkpoint(
        repository,
        checkpoint,
        name,
        inside=inside,
        step=step,
        message=message,
        metrics=metrics or {},
        codec=codec,
        branch=branch,
        head_stays=head_stays,
        progress=progress,
    )


def commit_checkpoint(
    repository: Repository,
    checkpoint: Checkpoint,
    path: str,
    *,
    inside: bool,
    step: int | None,
    message: str,
    metrics: Mapping[str, float],
    codec: str | None,
    branch: str | None = None,
    head_stays: bool = False,
    progress: Progress = quiet,
    announce: Announce = silent,
) -> CommitResult:
    """Commit what has been opened already.  `announce` is called just before a branch moves to a
    commit that is made.

    Raises:
        InvalidInputError: the checkpoint changed while it was read.
        ConflictError: another writer moved the branch meanwhile.
        BusyError: gc is sweeping.
        CorruptionError: what it would depend on is missing or damaged.
        StorageError: the disk is full, or fails.
    """
    config = repository.commit_config()
    request = Request.of(
        checkpoint,
        path,
        inside=inside,
        message=message,
        step=step,
        metrics=metrics,
        spec=repository.codec_for(codec, metrics, config),
        branch=branch,
        head_stays=head_stays,
    )
    with repository.held_base(checkpoint.kind) as held, checkpoint.kept_open():
        result = Committer(repository, config, progress, held, announce).commit(request)
    with after(f"commit {result.id[:8]} was made"):
        keep_reserve(repository.cache)
    return result


class Committer:
    """Makes one commit in a repository."""

    def __init__(
        self,
        repository: Repository,
        config: Config,
        progress: Progress = quiet,
        held: MemoryBase | None = None,
        announce: Announce = silent,
    ) -> None:
        """`config` holds the settings as they were when the commit began."""
        self._repository, self._config = repository, config
        self._catalog, self._refs = repository.catalog, repository.refs
        self._progress, self._held, self._announce = progress, held, announce
        self._move: Move | None = None  # the one that makes the commit

    def commit(self, request: Request) -> CommitResult:
        """Add one commit to the history; raises as `commit_checkpoint`."""
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

    def _commit(self, request: Request) -> CommitResult:
        with lease(self._catalog.store.backend) as held:
            checkpoint = request.checkpoint
            patched = self._config.exact_rule.wants_patch(request.metrics)
            near = isinstance(request.spec.settings, NearSpec)
            file_hashes, hashes = scan(checkpoint, self._progress, stay=near and not patched)
            place = self.place(request, Scanned(checkpoint, file_hashes, hashes, patched))
            base = self.base(place.parent)
            if base is not None and place.unchanged:
                encoded = unchanged(base, patched=patched)
            else:
                keyframe = (
                    base is None
                    or has_other_weights(self._catalog, checkpoint, base)
                    or self.starts_keyframe(place.parent)
                )
                encoded = self._encode(request, base, hashes, keyframe=keyframe, patched=patched)
            return self.complete(request, place, base, encoded, file_hashes, held)

    def place(self, request: Request, scanned: Scanned | None) -> Place:
        """Return where a commit goes; without `scanned`, as if it held what its parent holds."""
        head = self._refs.read(HEAD)
        following = head.branch if head else "main"
        wanted = check_name(request.branch, "branch") if request.branch else None
        asked = wanted or following
        parent: ObjectId | None = None
        if head is not None and (wanted or not head.branch):
            parent = self._tip(head.branch) if head.branch else head.commit
        situation = Situation(
            find_step(request),
            wanted,
            Head(following, self._last_branch),
            self._refs.read(f"heads/{asked}") if asked else None,
            parent,
            frozenset(self._refs.names("heads")),
            request.head_stays,
        )

        def likeness(commit: ObjectId | None) -> Likeness:
            if scanned is None:
                return Likeness.ALL
            return compare(self._catalog, self._repository.revisions, scanned, commit)

        return decide(situation, self._steps, likeness)

    def _steps(self, name: ObjectId | None) -> Iterator[tuple[ObjectId, int | None]]:
        return ((found, commit.step) for found, commit in self._catalog.line(name))

    def _tip(self, branch: str) -> ObjectId | None:
        state = self._refs.read(f"heads/{branch}")
        return state.commit if state else None

    def _last_branch(self) -> str:
        return next((g.branch for g in self._refs.readable(HEAD) if g.branch), "main")

    def base(self, parent: ObjectId | None) -> Commit | None:
        """Return what a commit can be coded against: its parent, unless that was dropped."""
        if parent is None or parent in self._catalog.dropped().commits:
            return None
        return self._catalog.commit(parent)

    def starts_keyframe(self, parent: ObjectId | None) -> bool:
        """Return whether the chain that ends at `parent` is as deep, or as heavy, as is allowed."""
        deltas = 0
        for _, commit in self._catalog.ancestors(parent):
            if commit.kind == "keyframe":
                return deltas > self._config.keyframe_bytes * commit.data_bytes
            if commit.depth >= self._config.keyframe_depth:
                return True
            deltas += commit.data_bytes
        return True

    def _encode(
        self,
        request: Request,
        base: Commit | None,
        hashes: dict[int, bytes],
        *,
        keyframe: bool,
        patched: bool,
    ) -> Encoded:
        checkpoint = request.checkpoint
        held = self._held if checkpoint.kind == "state" else None

        def encode(attempt: Attempt) -> Encoded:
            return Encoder(
                self._catalog,
                self._repository.bases,
                attempt,
                base,
                checkpoint,
                dict(hashes),
                progress=self._progress,
                memory=held,
            ).encode()

        first = Attempt.first(request.spec, keyframe=keyframe, patched=patched)
        return within_bounds(first, encode)

    def complete(
        self,
        request: Request,
        place: Place,
        base: Commit | None,
        encoded: Encoded,
        file_hashes: list[str | None],
        held: str,
    ) -> CommitResult:
        """Make a commit of what is stored, and move its branch; `held` names the lease that was
        held all the time.

        Raises:
            SharedPatchFadedError: it shares an exact patch that is let go.
            ConflictError, InvalidInputError, CorruptionError, StorageError: as in `commit`.
        """
        store = self._catalog.store
        pack = store.new_pack("meta")
        try:
            name, commit = Description(store, pack).add(request, place, base, encoded, file_hashes)
            fading = self._fading(name, commit, is_head=place.moves_head)
            for record in self._fader().record(fading, commit.time):
                pack.add(Kind.RECORD, dump_drop_record(record))
            request.checkpoint.check_unchanged()
            info = store.publish(pack)
        finally:
            pack.abort()
        require_packs(self._catalog, mark(self._catalog, {name: commit}, self._catalog.dropped()))
        store.backend.settle_seen()  # those who wrote what it depends on may have been killed
        # Who lets a patch go says so first, and looks then who shares it: one sees the other.
        if any(is_gone(self._catalog, exact) for exact in encoded.shared):
            raise SharedPatchFadedError
        check_lease(store.backend, held)
        notes = [*place.notes, *request.checkpoint.notes, *encoded.notes]
        if request.spec.settings is not None and not self._has_schema(place.parent, commit.schema):
            notes += unknown_floats(request.checkpoint.schema, request.checkpoint.size_bytes)
        self.publish(place, name, commit)
        self._stay_or_take_back(place, name, held)
        # It is in the history now: what goes wrong from here on, gc makes good.
        with contextlib.suppress(CkptError, OSError, MemoryError):
            self._fade(fading, name, held, is_head=place.moves_head)
        self._catalog.forget_commits()
        return CommitResult(
            name, commit, encoded.data_bytes + info.size_bytes, place.branch, tuple(notes)
        )

    def _has_schema(self, parent: ObjectId | None, schema: ObjectId) -> bool:
        """Whether the parent has the same tensors, of which all has been said."""
        return parent is not None and self._catalog.commit(parent).schema == schema

    def publish(self, place: Place, name: ObjectId, commit: Commit) -> None:
        """Move the branch, and HEAD if it follows, to the commit."""
        head = self._refs.read(HEAD)
        takes_head = place.moves_head and (head is None or head.branch != place.branch)
        move = Move(name, place.branch, place.tip, head, takes_head, commit.time)
        self._announce(move)
        self._move = move
        with after(self._made):
            self._refs.make(move)

    def _stay_or_take_back(self, place: Place, name: ObjectId, held: str) -> None:
        """Take the commit back if the lease ended before the branch moved: gc may have swept what
        the commit depends on.
        """
        try:
            check_lease(self._catalog.store.backend, held)
        except CkptError:
            from ckptvcs.history.reflog import take_back  # noqa: PLC0415  hardly ever needed

            if take_back(self._catalog, self._refs, place.branch, place.tip, name):
                raise

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

    def _fading(self, name: ObjectId, commit: Commit, *, is_head: bool) -> list[Patch]:
        """The exact patches to let go once a commit is in the history: none, if it is the first one
        with values that are not finite.
        """
        (parent,) = commit.parents or (None,)
        before = self._catalog.commit(parent).nonfinite if parent else 0
        if commit.nonfinite > before:
            return []
        return self._fader().after(parent, (name, commit), is_head=is_head)

    def _fade(self, recorded: list[Patch], name: ObjectId, held: str, *, is_head: bool) -> None:
        """Delete patches, but for those that a tag, a pin or a setting has come to keep meanwhile;
        who pins waits for this process as long as it holds its lease.
        """
        fader = self._fader()
        still = {patch.pack for patch in fader.after(name, is_head=is_head)} if recorded else set()
        check_lease(self._catalog.store.backend, held)
        fader.delete(patch for patch in recorded if patch.pack in still)

    def _fader(self) -> Fader:
        """The exact patches, and which of them the settings keep at this moment."""
        rule = self._repository.commit_config().exact_rule
        return Fader(self._catalog, self._refs, rule)


def unchanged(base: Commit, *, patched: bool) -> Encoded:
    """What is stored for a checkpoint that a commit holds already; its exact patches are shared."""
    shared = [state.exact for state in base.parts.values() if state.exact]
    return Encoded(
        dict(base.parts),
        {},
        [],
        base.depth,
        0,
        0,
        base.nonfinite,
        base.error,
        {},
        shared if patched else [],
    )
