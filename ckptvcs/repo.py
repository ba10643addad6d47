"""Repo: one repository, and everything that can be done with it.

    repo = Repo.init("runs/exp1")
    repo.commit({"model": model.state_dict()}, step=2000, metrics={"loss": 2.31})
    state = repo.checkout(2000)

Paths: DIR/.ckpt holds the store; DIR is the folder that committed paths are relative to.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ckptvcs.config import (
    KEYS,
    Config,
    Value,
    default_text,
    get_setting,
    load_config,
    set_setting,
)  # fmt: skip
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.format import FORMAT, check_format, raise_flags, require_flags, write_format
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.history.fading import Fader
from ckptvcs.history.log import History, LogEntry
from ckptvcs.history.refs import HEAD, Generation, Refs, check_name
from ckptvcs.history.retention import Policy
from ckptvcs.history.revision import Revisions
from ckptvcs.store.local import LocalBackend, storage_error, sync_directory
from ckptvcs.store.object import ObjectId
from ckptvcs.store.objects import FOLDERS, ObjectStore

if TYPE_CHECKING:
    from ckptvcs.bases import HeldBase
    from ckptvcs.checkout import CheckedOut, WorkTree
    from ckptvcs.checkpoint.checkpoint import Checkpoint
    from ckptvcs.committing import Result
    from ckptvcs.compare import Comparison
    from ckptvcs.history.gc import Collector, GcPlan
    from ckptvcs.history.undo import Event, Past, Undone
    from ckptvcs.restore import Restorer
    from ckptvcs.search import Bisection, Judge, Watch
    from ckptvcs.source import Progress
    from ckptvcs.verify import Report

# The methods that touch tensors import what they need when they are called: `log`, `show` and
# `status` start without numpy.

FOLDER = ".ckpt"
_NO_RULES = Policy()
_CACHE = "cache"
_CONFIG = "config.toml"


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
        self.config: Config = load_config(folder / _CONFIG)
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
            (folder / _CONFIG).write_text(settings, "utf-8")
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
        flags = ["near", "near-2"] if isinstance(spec.settings, NearSpec) else []
        if spec.settings is not None and self.config.exact_rule.wants_patch(metrics):
            flags.append("patches")
        raise_flags(self.folder, "read", *flags)
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

    def save_part(self, name: ObjectId, part: str, target: Path) -> None:
        """Write one part of a commit as .safetensors or as a torch.save file."""
        from ckptvcs.extract import PartReader  # noqa: PLC0415

        PartReader(self.restorer(name)).save(part, target)

    def diff(
        self,
        a: str | int = "HEAD~1",
        b: str | int = "HEAD",
        *,
        only: str | None = None,
        progress: Progress = _quiet,
    ) -> Comparison:
        """What lies between two commits, of all parts or of one; see `ckptvcs.compare`.

        Raises:
            NotFoundError, InvalidInputError: there is no such commit, or no such part.
        """
        from ckptvcs.compare import compare  # noqa: PLC0415

        left, right = self.resolve(a), self.resolve(b)
        return compare(
            self.catalog, (self.entry(left), self.restorer(left)),
            (self.entry(right), self.restorer(right)), only, progress,
        )  # fmt: skip

    def bisect(
        self, good: str | int, bad: str | int, judge: Judge,
        watch: Watch = lambda *_: None,
    ) -> Bisection:  # fmt: skip
        """The first bad commit between two; judges stand in `ckptvcs.search`.

        Raises:
            InvalidInputError: `good` is no ancestor of `bad`, or they are not what their names say.
        """
        from ckptvcs.search import bisect, line  # noqa: PLC0415

        names = line(self.catalog, self.resolve(good), self.resolve(bad))
        return bisect(names, self.entry, judge, watch)

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

    def settings(self) -> dict[str, Value]:
        """Every setting by its name."""
        return {key: get_setting(self.config, key) for key in KEYS}

    def configure(self, key: str, value: str | None) -> Value:
        """Change a setting, durably; None gives it its default back.  Its value from then on.

        Raises:
            InvalidInputError: there is no such setting, or it does not take that value.
        """
        self.config = set_setting(self.folder / _CONFIG, key, value)
        return get_setting(self.config, key)

    def pin(self, name: ObjectId, *, pinned: bool) -> bool:
        """Keep the exact form of a commit whatever the rules say, or no longer; whether that is
        new.  What has faded already does not come back.
        """
        from ckptvcs.committing import now  # noqa: PLC0415

        ref = f"pins/{name}"
        old = self.refs.read(ref)
        if pinned == (old is not None and old.commit is not None):
            return False
        raise_flags(self.folder, "gc", "pins")
        action = "pin" if pinned else "unpin"
        commit = name if pinned else None
        self.refs.publish(ref, old, commit=commit, time=now(), action=action)
        return True

    def set_ref(self, space: str, name: str, commit: ObjectId | None, action: str) -> None:
        """Create or move a branch (`heads`) or a tag (`tags`); None deletes it."""
        from ckptvcs.committing import now  # noqa: PLC0415

        check_name(name, "tag" if space == "tags" else "branch")
        ref = f"{space}/{name}"
        self.refs.publish(ref, self.refs.read(ref), commit=commit, time=now(), action=action)

    def reflog(self, branch: str | None = None) -> list[Event]:
        """What happened to a branch (HEAD's), newest first."""
        return self._past().events(branch)

    def undo(self) -> Undone:
        """Take back the last move of HEAD's branch, or the last drop of its commits.

        Raises:
            NotFoundError: there is nothing to take back.
            ConflictError: what it was about has been swept; or another writer moved the branch.
        """
        from ckptvcs.committing import now  # noqa: PLC0415

        return self._past().undo(now())

    def _past(self) -> Past:
        from ckptvcs.history.undo import Past  # noqa: PLC0415

        return Past(self.catalog, self.refs)

    # -- care ----------------------------------------------------------------------------------

    def fader(self) -> Fader:
        """What knows the exact patches, and which of them the settings keep."""
        return Fader(self.catalog, self.refs, self.config.exact_rule)

    def _collector(self) -> Collector:
        from ckptvcs.history.gc import Collector  # noqa: PLC0415

        require_flags(self.folder, "gc")
        best = self.config.exact_rule.best
        return Collector(self.catalog, self.refs, self.fader(), best)

    def plan_gc(self, policy: Policy = _NO_RULES) -> GcPlan:
        """What `gc` would drop, fade and delete now, without rekeying.

        Raises:
            CorruptionError: something that is needed is missing.
            InvalidInputError: the rules keep nothing at all.
        """
        return self._collector().plan(policy)

    def gc(
        self, policy: Policy = _NO_RULES, *, sweep: bool = True, rekey: bool = False,
        progress: Progress = _quiet,
    ) -> GcPlan:  # fmt: skip
        """Drop what the rules do not keep, let fade what the settings do not keep, and delete what
        nothing reaches; tiny packs are merged.  Without `sweep` it is only said what goes: until
        the next sweep `undo` takes it back.  What was done.

        Raises:
            BusyError: a writer is at work.
            CorruptionError: something that is needed is missing: nothing was deleted.
            InvalidInputError: the rules keep nothing at all.
        """
        from ckptvcs.committing import now  # noqa: PLC0415
        from ckptvcs.history.repack import merge, plan_merges  # noqa: PLC0415
        from ckptvcs.store.leases import exclusive  # noqa: PLC0415

        collector = self._collector()
        with exclusive(self._backend):
            plan = collector.plan(policy)
            if plan.drops:
                raise_flags(self.folder, "gc", "drops")
            collector.record(plan, now())
            if sweep:
                collector.sweep(plan)
                for batch in plan_merges(self.catalog, collector.mark_all()):
                    merge(self.catalog, batch)
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
        patches = sum(patch.size_bytes for patch in self.fader().patches())
        return Stats(
            len(commits), sum(c.raw_bytes for c in commits.values()), stored, stored - patches,
            patches, disk[_CACHE], len(self.catalog.store.list_packs()),
        )  # fmt: skip
