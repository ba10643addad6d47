"""Keeping: what the history has of a checkpoint, proven before its originals go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ckptvcs.codec.spec import NearSpec
from ckptvcs.errors import CkptError, ConflictError, InvalidInputError
from ckptvcs.opened import CACHE
from ckptvcs.proof import prove
from ckptvcs.removal import Originals, Removed
from ckptvcs.repo import Repo
from ckptvcs.source import Progress
from ckptvcs.store.object import ObjectId


@dataclass
class Removal:
    """What became of the originals of a checkpoint: files that are gone, why others are not, and
    whether its commit was pinned for their sake.
    """

    removed: list[Removed] = field(default_factory=list)
    kept: str | None = None
    pinned: bool = False


class Keeper:
    """Proves commits of one repository, and removes originals that can be had again."""

    def __init__(self, repo: Repo, codec: str | None) -> None:
        """`codec` is the one that commits are made with now, if not that of the settings.

        Raises:
            InvalidInputError: there is no such codec.
        """
        self._repo, self._codec = repo, codec
        repo.config.codec_of(codec)

    def is_exact(self, name: ObjectId, progress: Progress) -> bool:
        """Prove a commit; see `ckptvcs.proof`."""
        catalog, cache = self._repo.catalog, self._repo.folder / CACHE / "bases"
        return prove(catalog, cache, name, self._bound(catalog.commit(name).codec), progress)

    def _bound(self, codec: str) -> float:
        """The error that weights may have which a codec has coded: as it is set now; 0 for any."""
        config = self._repo.commit_config()
        try:
            own = config.codec_of(self._codec)
            spec = own if codec == own.name else config.codec_of(codec)
        except InvalidInputError:  # one of a newer program, or one that keeps no bounds
            return 0.0
        return spec.settings.max_weight_error if isinstance(spec.settings, NearSpec) else 0.0

    def why_kept(self, name: ObjectId, *, accept_near: bool) -> str | None:
        """Why the originals of a commit may not be removed; None if they may, as far as can be told
        without reading them.
        """
        entry = self._repo.entry(name)
        if entry.exact or accept_near:
            return None
        error = entry.commit.error.weight_rel
        off = f"weights off by {error:.2g}" if error else "its weights are exact"
        return f"its commit is only near ({off})"

    def remove(
        self, name: ObjectId, top: str, originals: Originals, progress: Progress, *,
        accept_near: bool,
    ) -> Removal:  # fmt: skip
        """Delete the file or directory `top` that a commit was made of; of one that was made of
        several files of the folder `top` is empty.

        The commit is restored once more, in the form that it has now, and each file is hashed once
        more; whatever is not as it was committed stays.  Unless near is accepted, a commit that
        owes it to a patch that it is exact is pinned first, lest it fades later.

        The caller holds a lease.
        """
        done = Removal(kept=self.why_kept(name, accept_near=accept_near))
        if done.kept is None:
            try:
                self._remove(name, PurePosixPath(top), originals, progress, done, accept_near)
            except CkptError as error:
                done.kept = error.message
        return done

    def _remove(
        self, name: ObjectId, top: PurePosixPath, originals: Originals, progress: Progress,
        done: Removal, accept_near: bool,
    ) -> None:  # fmt: skip
        commit = self._repo.catalog.commit(name)
        inside = commit.source == "directory"
        files = [
            (top / file.path if inside else top, file.size, file.hash)
            for file in commit.files if file.skeleton is not None and file.hash is not None
        ]  # fmt: skip
        for path, size, _ in files:
            originals.check(path, size)
        patched = any(part.exact is not None for part in commit.parts.values())
        done.pinned = patched and not accept_near and self._repo.pin(name, pinned=True)
        try:
            if not self.is_exact(name, lambda _: None) and not accept_near:
                raise ConflictError("its commit has faded to near")
            for path, _, digest in files:
                done.removed.append(originals.remove(path, digest, progress))
        finally:
            if done.pinned and not done.removed:
                done.pinned = not self._repo.pin(name, pinned=False)
        folders = [top / f.path for f in commit.files if f.skeleton is None and f.link is None]
        if inside and top.name:
            gone = [originals.remove_directory(path) for path in [*folders[::-1], top]]
            if not all(gone):
                done.kept = "its directory holds what was not committed, or links"
