"""Repo: one repository, and everything that can be done with it.

    repo = Repo.init("runs/exp1")
    repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
    state = repo.checkout(2000)

Paths: DIR/.ckpt holds the store; DIR is the folder that committed paths are relative to.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ckptvcs.config import (
    FORMAT,
    Config,
    check_format,
    default_text,
    load_config,
    raise_flags,
    require_flags,
    write_format,
)  # fmt: skip
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.history.log import Bound, History, LogEntry
from ckptvcs.history.refs import HEAD, Generation, Refs, check_name
from ckptvcs.history.revision import Revisions
from ckptvcs.store.local import LocalBackend, storage_error, sync_directory
from ckptvcs.store.object import ObjectId
from ckptvcs.store.objects import FOLDERS, ObjectStore

if TYPE_CHECKING:
    from ckptvcs.bases import HeldBase
    from ckptvcs.checkout import CheckedOut, WorkTree
    from ckptvcs.checkpoint.checkpoint import Checkpoint
    from ckptvcs.committing import Result
    from ckptvcs.history.gc import GcPlan
    from ckptvcs.restore import Restorer
    from ckptvcs.source import Progress
    from ckptvcs.verify import Report

# The methods that touch tensors import what they need when they are called: `log`, `show` and
# `status` start without numpy.

FOLDER = ".ckpt"
_CACHE = "cache"


def _quiet(_: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Stats:
    """Sizes of a repository in bytes, as they are on disk."""

    commits: int
    raw_bytes: int
    stored_bytes: int
    history_bytes: int
    patch_bytes: int
    cache_bytes: int
    packs: int

    @property
    def ratio(self) -> float:
        """How many times smaller the repository is than the files that were committed."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0


class Repo:
    """An open repository.  Holds its own branch: a checkout elsewhere does not move it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder.parent
        check_format(folder)
        self._backend = LocalBackend(folder)
        self.config: Config = load_config(folder / "config.toml")
        store = ObjectStore(self._backend, folder / _CACHE / "index.lmdb", keys_of)
        self.catalog = Catalog(store)
        self.refs = Refs(self._backend)
        self.revisions = Revisions(self.catalog, self.refs)
        self.history = History(self.catalog, self.refs, self.revisions)
        self._branch: str | None = None
        self._held: HeldBase | None = None
        self._holder = Lock()
        self._sync_index()

    # -- opening -------------------------------------------------------------------------------

    @classmethod
    def init(cls, path: str | os.PathLike[str] = ".", *, codec: str | None = None) -> Repo:
        """Make a repository in DIR/.ckpt, or open the one that is there.  `codec` becomes its
        setting; without it commits are near.

        Raises:
            InvalidInputError: there is no such codec, or the repository there has another.
            StorageError: it cannot be written.
        """
        folder = Path(path) / FOLDER
        settings = default_text(codec)
        if (folder / "format").exists():
            repo = cls(folder)
            if codec not in (None, repo.config.codec):
                raise InvalidInputError(
                    f"{folder} is there already, with codec '{repo.config.codec}'",
                    hint=f"change it in {folder / 'config.toml'}",
                )
            return repo
        try:
            for name in (*FOLDERS, "refs", "leases", "marks", "tmp", _CACHE):
                (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / "config.toml").write_text(settings, "utf-8")
            refs = Refs(LocalBackend(folder))
            if refs.read(HEAD) is None:
                from ckptvcs.committing import now  # noqa: PLC0415  see above

                refs.publish(HEAD, None, commit=None, branch="main", time=now(), action="init")
            fields = {
                "format": FORMAT, "id": uuid.uuid4().hex,
                "flags": {"read": [], "write": [], "gc": []},
            }  # fmt: skip
            write_format(folder, fields)  # before: no repository; after: a whole one
            sync_directory(folder.parent)
        except OSError as error:
            raise storage_error(error, f"make a repository in {path}") from error
        return cls(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Repo:
        """Open the repository DIR or DIR/.ckpt.

        Raises:
            NotFoundError: there is none.
            UnsupportedVersionError: a newer program wrote it.
        """
        for folder in (Path(path) / FOLDER, Path(path)):
            if (folder / "format").is_file():
                return cls(folder)
        raise NotFoundError(f"no repository at {path}", hint="make one with 'ckpt init'")

    @classmethod
    def discover(cls, start: Path) -> Repo:
        """Open the repository of `start` or of the nearest folder above it.

        Raises:
            NotFoundError: there is none.
        """
        for folder in (start, *start.parents):
            if (folder / FOLDER / "format").is_file():
                return cls(folder / FOLDER)
        raise NotFoundError(
            f"no repository in {start} or above it",
            hint="make one with 'ckpt init', or name one with --repo or CKPT_DIR",
        )

    def _sync_index(self) -> None:
        """Refresh the index where it does not know what HEAD is at: another machine, or another
        process that crashed before it told the index, may have written.
        """
        head = self.revisions.head()
        if head is not None and not self.catalog.store.contains(head):
            self.catalog.store.refresh()

    # -- committing ----------------------------------------------------------------------------

    def commit(
        self,
        state: object,
        *,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
    ) -> LogEntry:
        """Commit a nested state of plain types, tensors and numpy arrays.

        Raises:
            InvalidInputError: the state holds something else; the message names its path.
            ConflictError: another writer moved the branch meanwhile.
        """
        from ckptvcs.checkpoint.state import STATE_FILE, state_checkpoint  # noqa: PLC0415

        result = self.commit_checkpoint(
            state_checkpoint(state), STATE_FILE, inside=True, step=step, message=message,
            metrics=metrics or {}, codec=codec, branch=self._branch,
        )  # fmt: skip
        self._branch = result.branch
        return self.entry(result.id, branch=result.branch)

    def commit_path(
        self,
        path: Path,
        *,
        message: str,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        codec: str | None = None,
        branch: str | None = None,
        raw: bool = False,
        progress: Progress = _quiet,
    ) -> Result:
        """Commit a checkpoint file or a directory of files.

        Raises:
            NotFoundError, InvalidInputError: there is no complete checkpoint at `path`.
            ConflictError: another writer moved the branch meanwhile.
        """
        from ckptvcs.checkpoint.checkpoint import open_checkpoint  # noqa: PLC0415

        if Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise InvalidInputError(f"{path} is part of the repository itself")
        full = Path(os.path.abspath(path))  # noqa: PTH100  links are kept as the user sees them
        root = Path(os.path.abspath(self.root))  # noqa: PTH100
        inside = full.is_relative_to(root)
        name = full.relative_to(root).as_posix() if inside else full.name
        checkpoint = open_checkpoint(path, raw=raw, skip=self.folder.resolve())
        return self.commit_checkpoint(
            checkpoint, name, inside=inside, step=step, message=message,
            metrics=metrics or {}, codec=codec, branch=branch, progress=progress,
        )  # fmt: skip

    def commit_checkpoint(
        self,
        checkpoint: Checkpoint,
        path: str,
        *,
        inside: bool,
        step: int | None,
        message: str,
        metrics: Mapping[str, float],
        codec: str | None,
        branch: str | None = None,
        progress: Progress = _quiet,
    ) -> Result:
        """Commit what has been opened already; see `Committer.commit`."""
        from ckptvcs.codec.spec import NearSpec, parse_codec  # noqa: PLC0415
        from ckptvcs.committing import (  # noqa: PLC0415
            Committer,
            Request,
            plain_message,
            plain_metrics,
            plain_step,
        )  # fmt: skip

        require_flags(self.folder, "write")
        spec = parse_codec(self.config.codec if codec is None else codec)
        if isinstance(spec.settings, NearSpec):
            raise_flags(self.folder, "read", "near", "near-2")
        bases = self.folder / _CACHE / "bases"
        if checkpoint.kind == "state" and self._held is None:
            from ckptvcs.bases import HeldBase  # noqa: PLC0415  see above

            self._held = HeldBase()
        request = Request(
            checkpoint,
            path,
            inside,
            message=plain_message(message),
            step=plain_step(step),
            metrics=plain_metrics(metrics),
            spec=spec,
            branch=branch,
        )
        # A commit of another thread that is still at work replaces the base in memory.
        alone = self._holder.acquire(blocking=False)
        try:
            held = self._held if alone else None
            return Committer(self.catalog, self.refs, bases, self.config, progress, held).commit(
                request
            )
        finally:
            if alone:
                self._holder.release()

    # -- reading -------------------------------------------------------------------------------

    def resolve(self, revision: str | int) -> ObjectId:
        """The commit that a revision names; an int is a step.

        Raises:
            NotFoundError, InvalidInputError: it names none, or several.
        """
        return self.revisions.resolve(str(revision))

    def restorer(self, name: ObjectId, *, near: bool = False) -> Restorer:
        """What reads one commit."""
        from ckptvcs.restore import Restorer  # noqa: PLC0415

        cache = self.folder / _CACHE / "bases"
        return Restorer(self.catalog, name, near=near, cache=cache, held=self._held)

    def checkout(self, revision: str | int) -> Any:
        """The state of a commit: the nested object that was committed, with its tensors.

        Tensors of torch come back as such (which imports torch); unknown classes come back as
        inert records and are never executed.  A directory comes back as a dict of its files.
        """
        from ckptvcs.extract import PartReader  # noqa: PLC0415

        return PartReader(self.restorer(self.resolve(revision))).state()

    def trajectory(
        self, select: str | Sequence[str] | None = None, *, start: Bound = None, stop: Bound = None,
        every: int | None = None, revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:  # fmt: skip
        """The states of a line of commits, oldest first, each with its entry in the log.

        A state is what `checkout` gives; with `select`, a glob or several over the names of tensors
        (`model.*`, as `ckpt show --json` has them), a flat dict of those, and nothing else is read.
        Only the frames since the commit before are decoded, and one state is in memory, besides
        those that the caller keeps.  The next is decoded from it: a tensor that the caller changes
        in place costs a walk down its whole chain.

        The line is HEAD's, or that of `revision`, or of `stop` where that is a revision.  `start`
        and `stop`, both included, are steps (bounds, which need not be those of commits) or
        revisions on the line; `every` leaves only commits whose step is a multiple of it.

        Raises:
            NotFoundError: a revision names nothing, or nothing on the line; no tensor of any of
                the commits is selected.
            InvalidInputError: a revision names several commits; `every` is below 1.
            CorruptionError: while it is walked: a tensor does not decode to its recorded hash.
        """
        from ckptvcs.trajectory import states  # noqa: PLC0415  see above

        globs = [select] if isinstance(select, str) else select
        names = self.history.line(start, stop, every, revision=revision)
        return self._with_entries(states(self.catalog, names, globs))

    def tensor(self, name: str, at: str | int = "HEAD") -> Any:
        """One tensor of a commit, as `checkout` gives it; nothing else is read or decoded.

        `name` is as `ckpt show --json` has it, or the end of that behind a dot or a colon, if one
        tensor alone is meant: `layers.0.weight` for `model.layers.0.weight`.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit or tensor, or several.
            CorruptionError: it does not decode to its recorded hash.
        """
        from ckptvcs.extract import PartReader  # noqa: PLC0415
        from ckptvcs.trajectory import find_tensor  # noqa: PLC0415

        reader = PartReader(self.restorer(self.resolve(at)))
        full, window = find_tensor(reader.schema, name)
        return reader.tensors({full: window})[full]

    def series(
        self, name: str, *, start: Bound = None, stop: Bound = None, every: int | None = None,
        revision: str | int | None = None,
    ) -> Iterator[tuple[LogEntry, Any]]:  # fmt: skip
        """One tensor along a line, of those commits that have it; as `trajectory` and `tensor`."""
        from ckptvcs.trajectory import series  # noqa: PLC0415

        names = self.history.line(start, stop, every, revision=revision)
        return self._with_entries(series(self.catalog, names, name))

    def _with_entries(
        self, found: Iterable[tuple[ObjectId, Any]]
    ) -> Iterator[tuple[LogEntry, Any]]:
        tags = self.history.tags()

        def named(pair: tuple[ObjectId, Any]) -> tuple[LogEntry, Any]:
            return self.entry(pair[0], tags=tags.get(pair[0], ())), pair[1]

        return map(named, found)  # a loop would hold a value while the next one is decoded

    def save_part(self, name: ObjectId, part: str, target: Path) -> None:
        """Write one part of a commit as .safetensors or as a torch.save file."""
        from ckptvcs.extract import PartReader  # noqa: PLC0415

        PartReader(self.restorer(name)).save(part, target)

    def worktree(self) -> WorkTree:
        """The files outside the store."""
        from ckptvcs.checkout import WorkTree  # noqa: PLC0415

        return WorkTree(self.catalog, self.root, self.folder / _CACHE / "written")

    def checkout_files(
        self,
        name: ObjectId,
        output: Path | None = None,
        *,
        force: bool = False,
        progress: Progress = _quiet,
    ) -> CheckedOut:
        """Write the files of a commit; HEAD stays where it is (see `move_head`)."""
        return self.worktree().write(self.restorer(name), output, progress, force=force)

    def move_head(self, name: ObjectId, branch: str | None) -> str | None:
        """Point HEAD at a commit; at a branch where the commit is its newest.  That branch."""
        from ckptvcs.committing import now  # noqa: PLC0415

        head = self.refs.read(HEAD)
        tips = {n: self.revisions.branch(n) for n in self.refs.names("heads")}
        at = [n for n, tip in tips.items() if tip == name]
        following = head.branch if head else None
        if branch not in at:
            branch = following if following in at else (at[0] if at else None)
        commit = None if branch else name
        if head is None or (head.branch, head.commit) != (branch, commit):
            self.refs.publish(
                HEAD, head, commit=commit, branch=branch, time=now(), action="checkout"
            )
        return branch

    # -- history -------------------------------------------------------------------------------

    def head(self) -> Generation | None:
        """What HEAD is at."""
        return self.refs.read(HEAD)

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """A commit as the log shows it."""
        return self.history.entry(name, branch=branch, tags=tags)

    def log(
        self, limit: int | None = None, *, revision: str | None = None, all_branches: bool = False
    ) -> list[LogEntry]:
        """Commits, newest first: HEAD's line (or that of `revision`), or those of all branches."""
        start = None if revision is None else self.resolve(revision)
        return self.history.entries(limit, start=start, all_branches=all_branches)

    def set_ref(self, space: str, name: str, commit: ObjectId | None, action: str) -> None:
        """Create or move a branch (`heads`) or a tag (`tags`); None deletes it."""
        from ckptvcs.committing import now  # noqa: PLC0415

        check_name(name, "tag" if space == "tags" else "branch")
        ref = f"{space}/{name}"
        self.refs.publish(ref, self.refs.read(ref), commit=commit, time=now(), action=action)

    # -- care ----------------------------------------------------------------------------------

    def plan_gc(self) -> GcPlan:
        """What a sweep would delete now."""
        from ckptvcs.history.gc import plan_gc  # noqa: PLC0415

        require_flags(self.folder, "gc")
        return plan_gc(self.catalog, self.refs)

    def gc(self) -> GcPlan:
        """Sweep what nothing reaches; what was deleted.

        Raises:
            BusyError: a writer is at work.
            CorruptionError: something that is needed is missing: nothing was deleted.
        """
        from ckptvcs.history.gc import sweep  # noqa: PLC0415
        from ckptvcs.store.leases import exclusive  # noqa: PLC0415

        with exclusive(self._backend):
            plan = self.plan_gc()
            sweep(self.catalog, plan)
        return plan

    def verify(self, progress: Progress = _quiet) -> Report:
        """Prove that everything can be read; see `ckptvcs.verify`."""
        from ckptvcs.verify import Verifier  # noqa: PLC0415

        return Verifier(self.catalog, self.refs, progress).run()

    def stats(self) -> Stats:
        """Sizes on disk."""
        commits = dict(self.revisions.reachable(self.revisions.tips().values()))
        disk = {
            name: sum(self._backend.size(file) for file in self._backend.names(name))
            for name in (*FOLDERS, "refs", "leases", "marks", _CACHE)
        }
        single = sum(self._backend.size(name) for name in ("format", "config.toml"))
        stored = sum(disk.values()) - disk[_CACHE] + single
        patches = sum(commit.patch_bytes for commit in commits.values())
        return Stats(
            len(commits), sum(c.raw_bytes for c in commits.values()), stored, stored - patches,
            patches, disk[_CACHE], len(self.catalog.store.list_packs()),
        )  # fmt: skip
