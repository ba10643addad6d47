"""Clone: make a repository of the commits of a bundle file.

The repository gets its name when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ckptvcs.errors import ConflictError, InvalidInputError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.refs import HEAD
from ckptvcs.ops.bundle_source import Source, opened
from ckptvcs.ops.fetch import Fetcher
from ckptvcs.ops.repository import FOLDER, Repository
from ckptvcs.parallel import Progress, quiet
from ckptvcs.store import disk


def clone(path: Path, directory: Path | None, progress: Progress = quiet) -> Path:
    """Make a repository of a bundle file and return its folder; see `Repo.clone`."""
    if directory is None:
        if not path.suffix:
            raise InvalidInputError(
                f"'{path}' has no suffix", hint="name the directory of the new repository"
            )
        directory = Path(path.stem)
    target = directory / FOLDER
    if os.path.lexists(target):
        raise ConflictError(
            f"{target} exists", hint="add commits to a repository with 'ckpt fetch'"
        )
    with opened(path, progress) as source:
        made = _make_folder(directory)
        temporary = directory / f"{FOLDER}-{os.urandom(6).hex()}"
        try:
            _fill(temporary, source, progress)
            disk.rename(temporary / FOLDER, target)
            disk.sync_folder(directory)
            disk.sync_above(target)
            made = False
        except FileExistsError as error:
            raise ConflictError(f"{target} was created meanwhile") from error
        except OSError as error:
            raise disk.storage_error(error, f"create a repository in {directory}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):
                    directory.rmdir()
    return target


def _make_folder(directory: Path) -> bool:
    """Make a folder durably; return whether it is new."""
    made = not directory.exists()
    try:
        disk.make_folder(directory)
    except OSError as error:
        raise disk.storage_error(error, f"create {directory}") from error
    return made


def _fill(place: Path, source: Source, progress: Progress) -> None:
    """Create the repository, with HEAD on its branch."""
    repository = Repository.init(place)
    try:
        Fetcher(repository, source, progress).run()
        head, wanted = repository.head(), source.manifest.head
        if wanted is not None and (head is None or head.branch != wanted):
            repository.refs.publish(
                HEAD, head, commit=None, branch=wanted, time=now(), action="clone"
            )
    finally:
        repository.catalog.store.index.close()
