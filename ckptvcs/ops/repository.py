"""An open repository: its folder, settings, refs and object catalog.

Paths: DIR/.ckpt holds the store; DIR is the folder that committed paths are relative to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Self, TypeVar

from ckptvcs.errors import (
    ConflictError,
    CorruptionError,
    InvalidInputError,
    MissingObjectError,
    NotFoundError,
)
from ckptvcs.gc.fading import Fader
from ckptvcs.history.canonical_json import now
from ckptvcs.history.catalog import Catalog, keys_of
from ckptvcs.history.format_file import (
    FOLDERS,
    check_format,
    is_repository,
    new_format,
    raise_flags,
    require_flags,
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
from ckptvcs.store.reserve import keep_reserve

if TYPE_CHECKING:
    from ckptvcs.codec.spec import CodecSpec
    from ckptvcs.decode.base_cache import MemoryBase
    from ckptvcs.decode.commit_reader import Restorer

T = TypeVar("T")

FOLDER = ".ckpt"
CACHE = "cache"
CONFIG = "config.toml"


class Repository:
    """What every operation begins with."""

    def __init__(self, folder: Path, backend: Backend | None = None) -> None:
        """`backend` holds the files of the repository, except settings and cache; by default
        `backend_at(folder)`.
        """
        occupy_standard()
        self.folder = folder = folder.absolute()  # the working directory may change
        self.root = folder.parent
        refuse_links(folder, *map(PurePosixPath, FOLDERS))
        self.backend = self.backend_at(folder) if backend is None else backend
        check_format(self.backend)
        self.cache, self.bases = folder / CACHE, folder / CACHE / "bases"
        self.backend.size("format")  # who made the repository may have been killed just then
        self._settings = Settings(folder / CONFIG)
        with contextlib.suppress(InvalidInputError):  # an error of what needs them, and of no other
            self._settings.now()
        store = ObjectStore(self.backend, self.cache / "index", keys_of)
        self.catalog = Catalog(store)
        self.refs = Refs(self.backend)
        self.revisions = Revisions(self.catalog, self.refs)
        self.history = History(self.catalog, self.refs, self.revisions)
        self._held: MemoryBase | None = None
        self._holder = Lock()
        self._sync_index()

    @property
    def config(self) -> Config:
        """The settings as they are at this moment.

        Raises:
            InvalidInputError: they cannot be read.  Nothing but what needs them is refused then.
        """
        return self._settings.now()

    def commit_config(self) -> Config:
        """The settings for a commit; see `Settings.for_commit`."""
        return self._settings.for_commit()

    @staticmethod
    def backend_at(folder: Path) -> Backend:
        """Return the backend of the repository in `folder`; nothing else chooses a backend."""
        return LocalBackend(folder)

    @classmethod
    def init(
        cls,
        path: str | os.PathLike[str] = ".",
        *,
        codec: str | None = None,
        backend: Backend | None = None,
    ) -> Self:
        """Make a repository in DIR/.ckpt, or open the one that is there.  `codec` becomes its
        setting; without it commits are near.

        Raises:
            InvalidInputError: there is no such codec, or the repository there has another.
            StorageError: it cannot be written.
        """
        occupy_standard()
        folder = Path(path) / FOLDER
        settings = default_text(codec)
        backend = cls.backend_at(folder) if backend is None else backend
        if is_repository(backend):
            repo = cls(folder, backend)
            if codec not in (None, repo.config.codec):
                raise InvalidInputError(
                    f"{folder} is there already, with codec '{repo.config.codec}'",
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
                with contextlib.suppress(ConflictError):  # another process makes it, too
                    refs.publish(HEAD, None, commit=None, branch="main", time=now(), action="init")
            # Before this there is no repository, after it a whole one.
            write_format(backend, new_format(), new=True)
            disk.sync_above(folder)
            keep_reserve(folder / CACHE)
        except (ConflictError, FileExistsError) as error:
            if is_repository(backend):  # another process has made it meanwhile
                return cls.init(path, codec=codec, backend=backend)
            raise InvalidInputError(
                f"{getattr(error, 'filename', None) or folder} is in the way of a repository",
                hint="delete it, or choose another directory",
            ) from error
        except OSError as error:
            raise disk.storage_error(error, f"make a repository in {path}") from error
        return cls(folder, backend)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the repository DIR or DIR/.ckpt.

        Raises:
            NotFoundError: there is none.
            UnsupportedVersionError: a newer program wrote it.
        """
        return cls(cls.locate(path))

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Return whether `folder` is the folder of a repository."""
        return is_repository(cls.backend_at(folder))

    @classmethod
    def locate(cls, path: str | os.PathLike[str]) -> Path:
        """The folder of the repository DIR or DIR/.ckpt.  Raises NotFoundError: there is none."""
        for folder in (Path(path) / FOLDER, Path(path)):
            if cls.exists(folder):
                return folder
        raise NotFoundError(f"no repository at {path}", hint="make one with 'ckpt init'")

    @classmethod
    def locate_above(cls, start: Path) -> Path:
        """Its folder.  Raises NotFoundError: there is none."""
        for folder in (start, *start.parents):
            if cls.exists(folder / FOLDER):
                return folder / FOLDER
        raise NotFoundError(
            f"no repository in {start} or above it",
            hint="make one with 'ckpt init', or name one with --repo or CKPT_DIR",
        )

    def _sync_index(self) -> None:
        """Refresh the index where it does not know what HEAD is at: another machine, or another
        process that crashed before it told the index, may have written.
        """
        with contextlib.suppress(CorruptionError):  # who needs HEAD will say so; verify does not
            head = self.revisions.head()
            if head is not None and not self.catalog.store.contains(head):
                self.catalog.store.refresh()

    def resolve(self, revision: str | int) -> ObjectId:
        """The commit that a revision names; an int is a step.

        Raises:
            NotFoundError, InvalidInputError: it names none, or several.
        """
        return self.revisions.resolve(str(revision))

    def restorer(self, name: ObjectId, *, near: bool = False) -> Restorer:
        """What reads one commit."""
        from ckptvcs.decode.commit_reader import Restorer  # noqa: PLC0415

        return Restorer(self.catalog, name, near=near, cache=self.bases, memory=self._held)

    @contextmanager
    def held_base(self, kind: str) -> Iterator[MemoryBase | None]:
        """Lend the decoded weights of the last state, which stay in memory, to a commit of a
        `kind` of checkpoint; None while a commit of another thread has them.
        """
        from ckptvcs.decode.base_cache import MemoryBase  # noqa: PLC0415  needs numpy

        if kind == "state" and self._held is None:
            self._held = MemoryBase()
        alone = self._holder.acquire(blocking=False)
        try:
            yield self._held if alone else None
        finally:
            if alone:
                self._holder.release()

    def read_again(self, read: Callable[[], T]) -> T:
        """Read, once more where something was missing: another process may have let it fade, or
        moved it, meanwhile.
        """
        try:
            return read()
        except MissingObjectError:
            self.catalog.store.refresh()
            self.catalog.forget()
            return read()

    def naming(self, path: Path) -> tuple[str, bool]:
        """How commits name a file or a directory, and whether they do so from this repository's
        folder.
        """
        full = Path(os.path.abspath(path))  # noqa: PTH100  links are kept as the user sees them
        root = Path(os.path.abspath(self.root))  # noqa: PTH100
        inside = full.is_relative_to(root)
        return full.relative_to(root).as_posix() if inside else full.name, inside

    def head(self) -> Generation | None:
        """What HEAD is at."""
        return self.refs.read(HEAD)

    def entry(
        self, name: ObjectId, *, branch: str | None = None, tags: tuple[str, ...] = ()
    ) -> LogEntry:
        """A commit as the log shows it."""
        return self.history.entry(name, branch=branch, tags=tags)

    def codec_for(
        self, codec: str | None, metrics: Mapping[str, float], config: Config
    ) -> CodecSpec:
        """The codec of a commit with these metrics and settings; programs that do not know what it
        writes keep away from the repository from here on.

        Raises:
            InvalidInputError: there is no such codec.
            UnsupportedVersionError: a newer program does not let this one write.
        """
        from ckptvcs.codec.spec import NearSpec  # noqa: PLC0415  needs numpy

        require_flags(self.backend, "write")
        spec = config.codec_of(codec)
        flags = ["types", *(["near", "near-2"] if isinstance(spec.settings, NearSpec) else [])]
        if spec.settings is not None and config.exact_rule.wants_patch(metrics):
            flags.append("patches")
        raise_flags(self.backend, "read", *flags)
        return spec

    @contextmanager
    def leading_to(self, name: ObjectId | None) -> Iterator[None]:
        """Move a ref while no gc sweeps, and nobody deletes an original because the ref leads to
        its commit; to a commit that is there, durably.

        Raises:
            BusyError: gc is sweeping, or somebody deletes originals and does not end.
            NotFoundError: the commit was dropped, or swept.
        """
        with lease(self.backend):
            self.catalog.store.refresh()
            self.catalog.forget()
            if name is not None:
                self.revisions.require_durable(name)
            with turn(self.backend):
                self.backend.settle_seen()
                yield

    def fader(self) -> Fader:
        """What knows the exact patches, and which of them the settings keep."""
        return Fader(self.catalog, self.refs, self.config.exact_rule)
