"""An open repository: its folder, settings, refs and object catalog.

DIR/.ckpt contains the store; committed paths are relative to DIR.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Self, TypeVar

from ckptvcs.errors import (
    ConflictError,
    CorruptionError,
    InvalidInputError,
    MissingObjectError,
    NotFoundError,
    StorageError,
)
from ckptvcs.gc.fading import Fader
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.history.format_file import (
    FOLDERS,
    check_format,
    is_repository,
    new_format,
    write_format,
)
from ckptvcs.history.log import History, LogEntry
from ckptvcs.history.refs import HEAD, Generation, Refs
from ckptvcs.history.revision import Revisions
from ckptvcs.ops.config import Config, Settings, default_text
from ckptvcs.store import disk
from ckptvcs.store.backend import Backend
from ckptvcs.store.descriptors import occupy_standard
from ckptvcs.store.ids import ObjectId
from ckptvcs.store.leases import lease, turn
from ckptvcs.store.local import LocalBackend, refuse_links
from ckptvcs.store.object_store import ObjectStore
from ckptvcs.store.reserve import give_up_reserve, keep_reserve

if TYPE_CHECKING:
    from ckptvcs.decode.base_cache import MemoryBase
    from ckptvcs.decode.commit_reader import Restorer

T = TypeVar("T")

FOLDER = ".ckpt"
CACHE = "cache"
CONFIG = "config.toml"


class Repository:
    """An open repository: its folder, settings, refs and object catalog."""

    def __init__(self, folder: Path, backend: Backend | None = None) -> None:
        """Open the repository in `folder`.

        `backend` stores its files, except settings and cache; the default is `backend_at(folder)`.
        """
        occupy_standard()
        self.folder = folder = folder.absolute()  # the working directory may change
        self.root = folder.parent
        refuse_links(folder, *map(PurePosixPath, FOLDERS))
        self.backend = self.backend_at(folder) if backend is None else backend
        check_format(self.backend)
        self.cache, self.bases = folder / CACHE, folder / CACHE / "bases"
        self.backend.size("format")  # `init` may have been killed before the file was durable
        self._settings = Settings(folder / CONFIG)
        with contextlib.suppress(InvalidInputError):  # only operations that need settings fail
            self._settings.now()
        store = ObjectStore(self.backend, self.cache / "index", keys_of)
        self.catalog = Catalog(store)
        self.refs = Refs(self.backend)
        self.revisions = Revisions(self.catalog, self.refs, self._newest_good)
        self.history = History(self.catalog, self.refs, self.revisions, self._lasting)
        self.held_exact = 0
        self._held: MemoryBase | None = None
        self._holder = Lock()
        self._sync_index()

    @property
    def config(self) -> Config:
        """The current settings.

        Raises:
            InvalidInputError: The settings cannot be read.
        """
        return self._settings.now()

    def setting_origins(self) -> dict[str, str]:
        """Return where each setting comes from; see `Settings.origins`."""
        return self._settings.origins()

    def commit_config(self) -> Config:
        """The settings for a commit; see `Settings.for_commit`.

        While `held_exact` is set, at least so many of the newest commits stay exact.
        """
        config = self._settings.for_commit()
        return replace(config, keep_exact=max(config.keep_exact, self.held_exact))

    @staticmethod
    def backend_at(folder: Path) -> Backend:
        """Return the backend of the repository in `folder`; only this method chooses a backend."""
        return LocalBackend(folder)

    @classmethod
    def init(
        cls,
        path: str | os.PathLike[str] = ".",
        *,
        codec: str | None = None,
        backend: Backend | None = None,
    ) -> Self:
        """Create a repository in `path`/.ckpt, or open the existing one; see `Repo.init`."""
        occupy_standard()
        folder = Path(path) / FOLDER
        settings = default_text(codec)
        backend = cls.backend_at(folder) if backend is None else backend
        if is_repository(backend):
            repo = cls(folder, backend)
            if codec not in (None, repo.config.codec):
                raise InvalidInputError(
                    f"{folder} exists and has codec '{repo.config.codec}'",
                    hint=f"change it with 'ckpt config codec {codec}'",
                )
            return repo
        try:
            disk.make_folder(folder)
            for name in (*FOLDERS, CACHE):
                (folder / name).mkdir(exist_ok=True)
            disk.replace(folder / CONFIG, settings.encode(), folder / "tmp")
            refs = Refs(backend)
            if not refs.numbers(HEAD):
                with contextlib.suppress(ConflictError):  # another process also creates it
                    refs.publish(HEAD, None, commit=None, branch="main", time=now(), action="init")
            # This file comes last: a folder without it is not a repository.
            write_format(backend, new_format(), new=True)
            disk.sync_above(folder)
            keep_reserve(folder / CACHE)
        except (ConflictError, FileExistsError) as error:
            if is_repository(backend):  # another process has created it meanwhile
                return cls.init(path, codec=codec, backend=backend)
            blocker = getattr(error, "filename", None) or folder
            raise InvalidInputError(
                f"cannot create a repository: {blocker} exists",
                hint="delete it, or choose another directory",
            ) from error
        except OSError as error:
            raise disk.storage_error(error, f"create a repository in {path}") from error
        return cls(folder, backend)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Return whether `folder` is the folder of a repository."""
        return is_repository(cls.backend_at(folder))

    @classmethod
    def locate(cls, path: str | os.PathLike[str] | None) -> Path:
        """Return the folder of the repository in DIR or DIR/.ckpt; see `HistoryReader.locate`."""
        start = Path.cwd()
        above = (folder / FOLDER for folder in (start, *start.parents))
        for folder in above if path is None else (Path(path) / FOLDER, Path(path)):
            if cls.exists(folder):
                return folder
        if path is not None:
            raise NotFoundError(f"no repository at {path}", hint="create one with 'ckpt init'")
        raise NotFoundError(
            f"no repository in {start} or above it",
            hint="create one with 'ckpt init', or name one with --repo or CKPT_DIR",
        )

    def _sync_index(self) -> None:
        """Refresh the index if it lacks the commit of HEAD.

        Another machine may have written it, or a process that crashed before it updated the index.
        """
        with contextlib.suppress(CorruptionError):  # operations that need HEAD raise it again
            head = self.revisions.head()
            if head is not None and not self.catalog.store.contains(head):
                self.catalog.store.refresh()

    def make_room(self, error: StorageError) -> None:
        """Delete the caches and the reserve after an error that a full disk has caused.

        Raises:
            StorageError: It is `error`: the disk is not full, or nothing could be deleted.
        """
        if not disk.is_full(error):
            raise error
        with contextlib.suppress(StorageError):  # no other disk has room for the index
            self.catalog.store.move_index_out()
        try:
            give_up_reserve(self.cache)
        except OSError:
            raise error from error.__cause__

    def resolve(self, revision: str | int) -> ObjectId:
        """Return the id of the commit that a revision names; an int is a step.

        Raises:
            NotFoundError: No commit matches.
            InvalidInputError: Several commits match.
            CorruptionError: The revision is `latest-good`, and no commit proves itself.
        """
        return self.revisions.resolve(str(revision))

    def _newest_good(self) -> ObjectId:
        from ckptvcs.ops.resume import newest_good  # noqa: PLC0415  needs numpy

        return newest_good(self)

    def restorer(self, name: ObjectId, *, near: bool = False) -> Restorer:
        """Return a reader of one commit; with `near` it ignores exact patches."""
        from ckptvcs.decode.commit_reader import Restorer  # noqa: PLC0415

        return Restorer(self.catalog, name, near=near, cache=self.bases, memory=self._held)

    @contextmanager
    def held_base(self, kind: str) -> Iterator[MemoryBase | None]:
        """Lend the decoded weights of the last state, which stay in memory, to one commit.

        Yields None if the `kind` of the checkpoint is not `state`, or if a commit of another thread
        uses them.
        """
        from ckptvcs.decode.base_cache import MemoryBase  # noqa: PLC0415  needs numpy

        if kind != "state" or not self._holder.acquire(blocking=False):
            yield None
            return
        try:
            self._held = MemoryBase() if self._held is None else self._held
            yield self._held
        finally:
            self._holder.release()

    def read_again(self, read: Callable[[], T]) -> T:
        """Call `read`, and call it again if an object is missing.

        Another process may have moved the object, or deleted an expired patch, meanwhile.
        """
        try:
            return read()
        except MissingObjectError:
            self.catalog.reload()
            return read()

    def naming(self, path: Path) -> tuple[str, bool]:
        """Return the name of a path in commits, and whether it is relative to the repository."""
        full = Path(os.path.abspath(path))  # noqa: PTH100  links are kept as the user sees them
        root = Path(os.path.abspath(self.root))  # noqa: PTH100
        inside = full.is_relative_to(root)
        return full.relative_to(root).as_posix() if inside else full.name, inside

    def head(self) -> Generation | None:
        """Return the current version of HEAD."""
        return self.refs.read(HEAD)

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """Return a commit as the log shows it."""
        return self.history.entry(name, branch=branch, tags=tags)

    @contextmanager
    def leading_to(self, name: ObjectId | None) -> Iterator[None]:
        """Check that a commit exists and is durable, and keep it while the caller moves a ref.

        Meanwhile no gc sweeps, and no process deletes originals because of the old ref.

        Raises:
            BusyError: gc is sweeping, or another process deletes originals and does not finish.
            NotFoundError: The commit was dropped or deleted.
        """
        with lease(self.backend):
            self.catalog.reload()
            if name is not None:
                self.revisions.require_durable(name)
            with turn(self.backend):
                self.backend.settle_seen()
                yield

    def _lasting(self) -> dict[ObjectId, frozenset[str]]:
        try:
            return self.fader().lasting()
        except InvalidInputError:  # the settings are unreadable: nothing is sure to last
            return {}

    def fader(self) -> Fader:
        """Return a fader of exact patches with the current settings."""
        config = self.commit_config() if self.held_exact else self.config
        return Fader(self.catalog, self.refs, config.exact_rule)
