"""Commit: a checkpoint -> packs, one commit object, one version of a branch.

    lease        keep gc from sweeping
    scan         hash files and tensors
    place        choose branch and parent (`ops/placement.py`)
    encode       write tensors to data packs; repeat with finer steps while an error is too large
    describe     write schema, file templates, hash tables, recipes and the commit to one meta pack
    publish      write the next version of the branch: the only commit point
    fade         delete exact patches that no rule keeps any more

A crash before `publish` leaves unreferenced packs, which gc deletes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ckptvcs.checkpoint.notes import unknown_floats
from ckptvcs.checkpoint.open import open_checkpoint
from ckptvcs.checkpoint.optimizer_state import Names
from ckptvcs.codec.spec import NearSpec
from ckptvcs.decode.base_cache import MemoryBase
from ckptvcs.encode.assemble import Encoded
from ckptvcs.encode.encoder import Encoder
from ckptvcs.encode.planner import Attempt, within_bounds
from ckptvcs.encode.source import scan
from ckptvcs.errors import CkptError, InvalidInputError, MissingObjectError, after
from ckptvcs.gc.fading import Faded, Fader, Patch
from ckptvcs.history.commit import Commit
from ckptvcs.history.format_file import raise_flags, require_flags
from ckptvcs.history.reachability import mark, require_packs
from ckptvcs.history.records import dump_drop_record
from ckptvcs.history.refs import HEAD, Move, check_name
from ckptvcs.ops.describe import Description
from ckptvcs.ops.likeness import Scanned, compare, has_other_weights, is_gone
from ckptvcs.ops.placement import Likeness, Place, Situation, decide
from ckptvcs.ops.repository import Repository
from ckptvcs.ops.request import Request, find_step
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store.disk import real_path
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.leases import check_lease, lease
from ckptvcs.store.reserve import keep_reserve
from ckptvcs.text import nonfinite_values

Announce = Callable[[Move], None]


@dataclass(frozen=True)
class CommitResult:
    """A new commit.

    Attributes:
        id: The id of the commit.
        commit: The commit object.
        stored_bytes: The bytes that the commit added to the repository.
        branch: The branch of the commit.
        notes: Warnings for the user, such as a branch that was started.
        faded: The older commits that became near with this one.
    """

    id: ObjectId
    commit: Commit
    stored_bytes: int
    branch: str
    notes: tuple[str, ...]
    faded: tuple[Faded, ...] = ()


class SharedPatchFadedError(Exception):
    """Another writer records the drop of an exact patch that this commit wanted to share."""


def commit_path(
    repository: Repository,
    path: str | os.PathLike[str],
    request: Request,
    *,
    raw: bool = False,
    names: Names | None = None,
    files: Sequence[str] = (),
    progress: Progress = quiet,
) -> CommitResult:
    """Commit a checkpoint file or a directory of files; see `Repo.commit_path`."""
    path, skip = Path(path), real_path(repository.folder)
    if real_path(path).is_relative_to(skip):
        raise InvalidInputError(f"{path} is part of the repository itself")
    name, inside = repository.naming(path)
    checkpoint = open_checkpoint(path, raw=raw, skip=skip, names=names, only=files)
    request = replace(request, checkpoint=checkpoint, path=name, inside=inside)
    return commit_checkpoint(repository, request, progress=progress)


def commit_checkpoint(
    repository: Repository,
    request: Request,
    *,
    progress: Progress = quiet,
    announce: Announce = quiet,
) -> CommitResult:
    """Commit an open checkpoint; `announce` is called just before the branch moves."""
    with repository.held_base(request.checkpoint.kind) as held, request.checkpoint.kept_open():
        result = Committer(repository, request, progress, held, announce).commit()
    with after(f"commit {result.id[:8]} was made"):
        keep_reserve(repository.cache)
    return result


class Committer:
    """Makes one commit in a repository, with the settings and the codec of its start."""

    def __init__(
        self,
        repository: Repository,
        request: Request,
        progress: Progress = quiet,
        held: MemoryBase | None = None,
        announce: Announce = quiet,
    ) -> None:
        """Prepare a commit, and raise the flags of the formats that it writes.

        Versions of the program that lack these formats then refuse to read the repository.

        Raises:
            InvalidInputError: The codec is not known.
            UnsupportedVersionError: A newer version forbids this version to write.
        """
        self._repository, self.request = repository, request
        self._catalog, self._refs = repository.catalog, repository.refs
        self._progress, self._held, self._announce = progress, held, announce
        self._config = repository.commit_config()
        require_flags(repository.backend, "write")
        self.spec = self._config.codec_of(request.codec)
        rule = self._config.exact_rule
        self.patched = rule.wants_patch(request.metrics) and not request.fades
        self._near = isinstance(self.spec.settings, NearSpec)
        flags = ["types", "sparse", *(["near", "near-2"] if self._near else [])]
        if self.patched and self.spec.settings is not None:
            flags.append("patches")
        raise_flags(repository.backend, "read", *flags)
        self._move: Move | None = None  # the announced move of the branch to the commit

    def commit(self) -> CommitResult:
        """Add the commit to the history; raises as `Repo.commit_path`."""
        rebuilt = False
        while True:
            try:
                with after(self._outcome):
                    return self._commit()
            except SharedPatchFadedError:
                continue  # the next attempt writes its own patch
            except MissingObjectError:  # after a power cut the index may be older than the packs
                if rebuilt:
                    raise
                rebuilt = True
                self._catalog.store.rebuild()
                self._catalog.forget()

    def _commit(self) -> CommitResult:
        with lease(self._catalog.store.backend) as lease_name:
            checkpoint = self.request.checkpoint
            stay = self._near and not self.patched
            file_hashes, hashes = scan(checkpoint, self._progress, stay=stay)
            place = self.place(Scanned(checkpoint, file_hashes, hashes, self.patched))
            encode = partial(self._encode, place.parent, hashes)
            return self.complete(place, encode, file_hashes, lease_name)

    def place(self, scanned: Scanned | None) -> Place:
        """Return the branch and the parent of the commit.

        Without `scanned`, the content is assumed to equal that of the parent.
        """
        request = self.request
        head = self._refs.read(HEAD)
        following = head.branch if head else "main"
        requested = check_name(request.branch, "branch") if request.branch else None
        branch, revisions = requested or following, self._repository.revisions
        situation = Situation(
            find_step(request),
            requested,
            following,
            self._last_branch,
            self._refs.read(f"heads/{branch}") if branch else None,
            revisions.head() if requested or not following else None,
            frozenset(self._refs.names("heads")),
            request.head_stays,
        )

        def likeness(commit: ObjectId | None) -> Likeness:
            if scanned is None:
                return Likeness.ALL
            return compare(self._catalog, revisions, scanned, commit)

        return decide(situation, self._steps, likeness)

    def _steps(self, name: ObjectId | None) -> Iterator[tuple[ObjectId, int | None]]:
        return ((commit_id, commit.step) for commit_id, commit in self._catalog.line(name))

    def _last_branch(self) -> str:
        return next((g.branch for g in self._refs.readable(HEAD) if g.branch), "main")

    def base(self, parent: ObjectId | None) -> Commit | None:
        """Return the base of a new commit: its parent, or None if the parent was dropped."""
        if parent is None or parent in self._catalog.dropped().commits:
            return None
        return self._catalog.commit(parent)

    def starts_keyframe(self, parent: ObjectId | None) -> bool:
        """Return whether the chain of `parent` has the maximum depth or size."""
        deltas = 0
        for _, commit in self._catalog.ancestors(parent):
            if commit.kind == "keyframe":
                return deltas > self._config.keyframe_bytes * commit.data_bytes
            if commit.depth >= self._config.keyframe_depth:
                return True
            deltas += commit.data_bytes
        return True

    def _encode(
        self, parent: ObjectId | None, hashes: dict[int, bytes], base: Commit | None
    ) -> Encoded:
        checkpoint = self.request.checkpoint
        keyframe = (
            base is None
            or has_other_weights(self._catalog, checkpoint, base)
            or self.starts_keyframe(parent)
        )

        def encode(attempt: Attempt) -> Encoded:
            return Encoder(
                self._catalog,
                self._repository.bases,
                attempt,
                base,
                checkpoint,
                dict(hashes),
                progress=self._progress,
                memory=self._held,
            ).encode()

        return within_bounds(
            Attempt.first(self.spec, keyframe=keyframe, patched=self.patched), encode
        )

    def complete(
        self,
        place: Place,
        encode: Callable[[Commit | None], Encoded],
        file_hashes: list[str | None],
        lease_name: str,
    ) -> CommitResult:
        """Encode the tensors, write the commit object, and move the branch.

        `encode` gets the base; it is not called if the checkpoint equals the base.  The caller has
        held the lease `lease_name` since before it chose `place`.

        Raises:
            SharedPatchFadedError: Another writer drops an exact patch that the commit shares.
            CkptError: As for `Repo.commit_path`.
        """
        store, request, base = self._catalog.store, self.request, self.base(place.parent)
        if base is not None and place.unchanged:
            encoded = unchanged(base, patched=self.patched)
        else:
            encoded = encode(base)
        pack = store.new_pack("meta")
        try:
            description = Description(store, pack, self.spec.name)
            name, commit = description.add(request, place, base, encoded, file_hashes)
            fading = self._fading(name, commit, is_head=place.moves_head)
            for record in self._fader().record(fading, commit.time):
                pack.add(Kind.RECORD, dump_drop_record(record))
            request.checkpoint.check_unchanged()
            info = store.publish(pack)
        finally:
            pack.abort()
        require_packs(self._catalog, mark(self._catalog, {name: commit}, self._catalog.dropped()))
        store.backend.settle_seen()  # the writers of objects that it needs may have been killed
        # A writer that drops a patch records that first, and then looks for commits that share it.
        # This commit exists before it looks for the record, so at least one side sees the other.
        if any(is_gone(self._catalog, exact) for exact in encoded.shared):
            raise SharedPatchFadedError
        check_lease(store.backend, lease_name)
        notes = [*place.notes, *request.checkpoint.notes, *encoded.notes]
        if self.spec.settings is not None and not self._has_schema(place.parent, commit.schema):
            notes += unknown_floats(request.checkpoint.schema, request.checkpoint.size_bytes)
        if commit.nonfinite:
            notes.append(f"{nonfinite_values(commit.nonfinite)} in the weights and moments")
        self.publish(place, name, commit)
        self._check_published(place, name, lease_name)
        # The commit is in the history.  If fading fails, the next gc repeats it.
        faded: tuple[Faded, ...] = ()
        with contextlib.suppress(CkptError, OSError, MemoryError):
            faded = self.fade(fading, name, lease_name, is_head=place.moves_head)
        self._catalog.forget_commits()
        stored = encoded.data_bytes + info.size_bytes
        return CommitResult(name, commit, stored, place.branch, tuple(notes), faded)

    def _has_schema(self, parent: ObjectId | None, schema: ObjectId) -> bool:
        """Return whether the parent has the same schema, so that its notes were shown before."""
        return parent is not None and self._catalog.commit(parent).schema == schema

    def publish(self, place: Place, name: ObjectId, commit: Commit) -> None:
        """Move the branch, and HEAD if it follows, to the commit."""
        head = self._refs.read(HEAD)
        takes_head = place.moves_head and (head is None or head.branch != place.branch)
        move = Move(name, place.branch, place.tip, head, takes_head, commit.time)
        self._announce(move)
        self._move = move
        with after(self._outcome):
            self._refs.make(move)

    def _check_published(self, place: Place, name: ObjectId, lease_name: str) -> None:
        """Take the commit back if the lease ended before the branch moved.

        gc may then have deleted objects that the commit depends on.
        """
        try:
            check_lease(self._catalog.store.backend, lease_name)
        except CkptError:
            from ckptvcs.history.reflog import take_back  # noqa: PLC0415  hardly ever needed

            if take_back(self._catalog, self._refs, place.branch, place.tip, name):
                raise

    def _outcome(self) -> str:
        """Return the text for an error after the branch may have moved, or "".

        A ref is visible before it is known to be durable, and HEAD moves after the branch.
        """
        if self._move is None:
            return ""
        try:
            outcome = "was made" if self._refs.has(self._move) else ""
        except (CkptError, OSError, MemoryError):
            outcome = "may have been made"
        return outcome and f"commit {self._move.commit[:8]} {outcome}"

    def _fading(self, name: ObjectId, commit: Commit, *, is_head: bool) -> list[Patch]:
        """Return the exact patches that expire with this commit.

        If the commit is the first one with non-finite values, no patch expires, so that the last
        finite commit stays exact.
        """
        (parent,) = commit.parents or (None,)
        before = self._catalog.commit(parent).nonfinite if parent else 0
        if commit.nonfinite > before:
            return []
        return self._fader().after(parent, (name, commit), is_head=is_head)

    def fade(
        self, recorded: list[Patch], name: ObjectId, lease_name: str, *, is_head: bool
    ) -> tuple[Faded, ...]:
        """Delete the recorded patches, except those that a new tag, pin or setting keeps.

        A process that pins waits until the lease of this one ends.
        """
        fader = self._fader()
        expired = fader.after(name, is_head=is_head) if recorded else []
        packs = {patch.pack for patch in expired}
        check_lease(self._catalog.store.backend, lease_name)
        gone = [patch for patch in recorded if patch.pack in packs]
        faded = fader.faded(gone)
        fader.delete(gone)
        return faded

    def _fader(self) -> Fader:
        """Return a fader with the current settings."""
        rule = self._repository.commit_config().exact_rule
        return Fader(self._catalog, self._refs, rule)


def unchanged(base: Commit, *, patched: bool) -> Encoded:
    """Return the encoded form of a checkpoint that equals `base`; it shares the exact patches."""
    shared = [state.exact for state in base.parts.values() if state.exact]
    return Encoded(
        dict(base.parts),
        depth=base.depth,
        nonfinite=base.nonfinite,
        error=base.error,
        shared=shared if patched else [],
    )
