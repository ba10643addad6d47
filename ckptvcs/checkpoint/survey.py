"""Find the checkpoints in a folder, and the order in which they were written.

Several files of one checkpoint count as one (`grouping.py`).  The survey does not follow symbolic
links and ignores hidden and temporary entries.  It skips all other entries that are not
checkpoints, and gives the reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from ckptvcs.checkpoint import torch_zip
from ckptvcs.checkpoint.conventions import (
    FOLDER_OF_ONE,
    PIECE,
    PIECE_OF_ONE,
    SHARD_SUFFIX,
    SUFFIXES,
    TAKEN_SUFFIXES,
    TEMPORARY,
    epochs_in_name,
    named_step,
    number_in_name,
    stem,
)
from ckptvcs.checkpoint.grouping import (
    family,
    group_files,
    is_numbered_piece,
    missing_files,
    shard_ids,
)
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.checkpoint.open import Checkpoint, InputFile, open_checkpoint
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.store.disk import real_path

_MODEL_SUFFIXES = (*TAKEN_SUFFIXES, SHARD_SUFFIX)
_TAR_MAGIC = 257  # where the header of a tar archive says `ustar`
_LISTED = 3
_WAIT = "wait until all of its files are written, or remove them"


@dataclass(frozen=True)
class Found:
    """A checkpoint in a folder.

    Attributes:
        name: The name in the folder; for several files, with `*` in place of the differing part.
        path: The file or directory; for several files, the folder.
        kind: `file` or `directory`.
        size_bytes: The size in bytes.
        step: The training step, if known.
        said: The step inside the checkpoint, if it has one.
        problem: The error, if the checkpoint cannot be committed.
        files: The names of the files, if several files of the folder form the checkpoint.
    """

    name: str
    path: Path
    kind: str
    size_bytes: int
    step: int | None
    said: int | None = None
    problem: CkptError | None = None
    files: tuple[str, ...] = ()

    @property
    def top(self) -> str:
        """The entry of the folder; "" for several files."""
        return "" if self.files else self.name


@dataclass(frozen=True)
class Skipped:
    """An entry of a folder that is not a checkpoint.

    Attributes:
        name: The name of the entry.
        reason: Why it is not a checkpoint.
    """

    name: str
    reason: str


def survey(folder: Path, pattern: str | None, store: Path) -> tuple[list[Found], list[Skipped]]:
    """Return the checkpoints in a folder and the skipped entries.  Both match `pattern`, a glob.

    Checkpoints are sorted by step, then by name, with numbers in names compared as numbers.

    The step comes from the name (`step-900`, `checkpoint-900`).  Otherwise it comes from inside the
    checkpoint, or from a number in the name that is not an epoch, shard, size or version.  Steps
    inside may count from 0, and names may count epochs.  So if a name has no step, but the step
    inside equals that inside a checkpoint whose name has one, the step of that name counts.

    Raises:
        NotFoundError: The folder does not exist or contains no checkpoint.
        InvalidInputError: The folder is a checkpoint itself or part of the `store`.
    """
    if real_path(folder).is_relative_to(store):
        raise InvalidInputError(f"{folder} is part of the repository itself")
    entries = _entries(folder)
    if pattern is None:
        _refuse_checkpoint(folder, entries)
    groups = {
        name: members
        for name, members in _groups(entries, pattern).items()
        if _stands_alone(name, members)
    }
    reasons = _reasons(entries, groups, pattern, store)
    skipped = [Skipped(name, reason) for name, reason in reasons.items() if reason is not None]
    alone: dict[str, list[str]] = {name: [] for name in reasons if reasons[name] is None}
    checkpoints = [
        _look_at(folder, name, members, store) for name, members in (alone | groups).items()
    ]
    if not checkpoints:
        why = f": {skipped[0].name} is {skipped[0].reason}" if len(skipped) == 1 else ""
        raise NotFoundError(
            f"no checkpoints in {folder}{why}",
            hint=f"name files with a suffix of {', '.join(SUFFIXES)}; directories hold such files",
        )
    return sorted(_agreed(_compared(checkpoints)), key=_order), skipped


def _refuse_checkpoint(folder: Path, entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        if _shows_a_checkpoint(entry):
            raise InvalidInputError(
                f"{folder} is a checkpoint itself: it holds {entry.name}",
                hint=f"run 'ckpt commit {folder}', or select checkpoints with --pattern",
            )


def candidates(folder: Path, pattern: str | None, store: Path) -> dict[str, list[str]]:
    """Return what `survey` may find, complete or not: the name of each, with its folder entries.

    The result is empty if the folder does not exist yet.

    Raises:
        InvalidInputError: The folder is a file or cannot be read.
    """
    try:
        entries = _entries(folder)
    except NotFoundError:
        return {}
    groups = _groups(entries, pattern)
    reasons = _reasons(entries, groups, pattern, store)
    return groups | {name: [name] for name in reasons if reasons[name] is None}


def _reasons(
    entries: Sequence[os.DirEntry[str]],
    groups: Mapping[str, Sequence[str]],
    pattern: str | None,
    store: Path,
) -> dict[str, str | None]:
    """Return why each entry outside the groups is not a checkpoint; None for a checkpoint."""
    grouped = {member for members in groups.values() for member in members}
    return {
        entry.name: _why_not(entry, store)
        for entry in entries
        if entry.name not in grouped and _is_looked_at(entry.name, pattern)
    }


def _groups(entries: Sequence[os.DirEntry[str]], pattern: str | None) -> dict[str, list[str]]:
    return group_files(
        [
            entry.name
            for entry in entries
            if _is_looked_at(entry.name, pattern)
            and entry.is_file(follow_symlinks=False)
            and entry.name.endswith(TAKEN_SUFFIXES)
            and (is_numbered_piece(entry.name) or not PIECE.fullmatch(entry.name))
        ]
    )


def _stands_alone(group: str, members: Sequence[str]) -> bool:
    """Return whether a group is a checkpoint.

    Model shards without a step may belong to a directory; they count only if all of them exist.
    """
    return not is_numbered_piece(members[0]) or (
        named_step(group) is not None or not missing_files(members)
    )


def _is_looked_at(name: str, pattern: str | None) -> bool:
    return not TEMPORARY.fullmatch(name) and fnmatchcase(name, pattern or "*")


def _shows_a_checkpoint(entry: os.DirEntry[str]) -> bool:
    """Return whether only a folder that is itself a checkpoint has such an entry."""
    kind = FOLDER_OF_ONE if entry.is_dir(follow_symlinks=False) else PIECE_OF_ONE
    return kind.fullmatch(entry.name) is not None and not entry.is_symlink()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        raise NotFoundError(f"no such folder: {folder}") from None
    except NotADirectoryError:
        raise InvalidInputError(
            f"{folder} is a file", hint="run 'ckpt commit' for a single checkpoint"
        ) from None
    except OSError as error:
        raise unreadable(folder, error) from error


def _agreed(checkpoints: list[Found]) -> list[Found]:
    """Replace a step inside a checkpoint by the step in the name of another one that has both."""
    named = {row.said: row.step for row in checkpoints if _is_named(row)}
    return [
        row
        if _is_named(row) or row.said is None
        else replace(row, step=named.get(row.said, row.step))
        for row in checkpoints
    ]


def _is_named(checkpoint: Found) -> bool:
    return named_step(checkpoint.name, checkpoint.said) is not None


def _order(checkpoint: Found) -> tuple[bool, int, bool, list[tuple[int, str]]]:
    """Return a sort key: by step, then by name with digits as numbers.

    Checkpoints without a step come last.  `step-1.pt` comes before `step-1-ema.pt`, and a name with
    the step before a copy such as `best.pt`.
    """
    parts = re.split(r"([0-9]+)", stem(checkpoint.name))
    natural = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return checkpoint.step is None, checkpoint.step or 0, not _is_named(checkpoint), natural


# -- entries that are not checkpoints --------------------------------------------------------------


def _why_not(entry: os.DirEntry[str], store: Path) -> str | None:
    """Return why an entry is not a checkpoint; None if it is one."""
    if entry.is_symlink():
        return "a symbolic link"
    if entry.is_dir(follow_symlinks=False):
        return _why_no_directory(Path(entry.path), store)
    if not entry.is_file(follow_symlinks=False):
        return "neither a file nor a directory"
    if PIECE.fullmatch(entry.name):
        return "a piece of a checkpoint, not one by itself"
    if not entry.name.endswith(TAKEN_SUFFIXES):
        return f"not a {', '.join(SUFFIXES)} file"
    return "a tar archive" if _is_archive(Path(entry.path)) else None


def _is_archive(path: Path) -> bool:
    """Return whether a file is a tar archive; a `model.pth.tar` of torch.save is not."""
    try:
        with path.open("rb") as file:
            file.seek(_TAR_MAGIC)
            return path.name.endswith(".tar") and file.read(5) == b"ustar"
    except OSError:
        return False  # opening the file reports the error


def _why_no_directory(path: Path, store: Path) -> str | None:
    try:
        entries = [e for e in _entries(path) if not e.is_symlink()]
        if store.is_relative_to(real_path(path)) or any(e.name.lower() == ".ckpt" for e in entries):
            return "a folder with a repository in it"
        if not _hold_model(entries):
            return "a folder without model files"
    except CkptError as error:
        return f"a folder that cannot be read: {error.message}"
    steps = _named_steps(entries)
    if len(steps) > 1 or (steps and named_step(path.name) is None):
        return "a folder of checkpoints; import it separately"
    return None


def _named_steps(entries: list[os.DirEntry[str]]) -> set[int]:
    """Return the steps in the names of directories and checkpoint files."""
    names = [
        entry.name
        for entry in entries
        if entry.is_dir(follow_symlinks=False) or entry.name.endswith(TAKEN_SUFFIXES)
    ]
    steps = (named_step(name) for name in names if not PIECE.fullmatch(name))
    return {step for step in steps if step is not None}


def _hold_model(entries: list[os.DirEntry[str]]) -> bool:
    """Return whether a model file is among these entries or below them."""
    pending = list(entries)
    while pending:
        entry = pending.pop()
        if entry.is_dir(follow_symlinks=False):
            pending += _entries(Path(entry.path))
        elif entry.is_file(follow_symlinks=False) and entry.name.endswith(_MODEL_SUFFIXES):
            return True
    return False


# -- checkpoints -----------------------------------------------------------------------------------


def _look_at(folder: Path, name: str, members: Sequence[str], store: Path) -> Found:
    """Return the checkpoint that an entry or several `members` of a folder form."""
    path, names = (folder, members) if members else (folder / name, [name])
    kind = "directory" if path.is_dir() else "file"
    checkpoint_of = partial(Found, name, path, kind, files=tuple(members))
    try:
        checkpoint = _open_group(folder, name, members) if members else _open_entry(path, store)
    except CkptError as error:
        size = sum(size for file in names for size in _sizes(folder / file))
        return checkpoint_of(size, _named_step_of(names, None, None), problem=error)
    return checkpoint_of(checkpoint.size_bytes, _step_of(names, checkpoint), checkpoint.step)


def _open_entry(path: Path, store: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path, skip=store)
    for file in checkpoint.files:
        _refuse_cut_off(file, path, alone=checkpoint.kind == "file")
    return checkpoint


def _open_group(folder: Path, name: str, members: Sequence[str]) -> Checkpoint:
    if missing := missing_files(members):
        raise _incomplete(name, missing, "missing")
    checkpoint = open_checkpoint(folder, only=members)
    if cut := [file.path for file in checkpoint.files if file.format == "raw"]:
        raise _incomplete(name, cut, "empty or cut off")
    return checkpoint


def _incomplete(name: str, files: Sequence[str], what: str) -> InvalidInputError:
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    listed = ", ".join(files[:_LISTED]) + more
    return InvalidInputError(
        f"{name} is incomplete: {listed} {'is' if len(files) == 1 else 'are'} {what}", hint=_WAIT
    )


def _step_of(names: Sequence[str], checkpoint: Checkpoint) -> int | None:
    """Return the step of a checkpoint, from the names of its files and from its content."""
    said, epoch = checkpoint.step, checkpoint.epoch
    step = _named_step_of(names, said, epoch)
    if step is None and said is None:
        epochs = {count for name in names for count in epochs_in_name(name)}
        numbers = {number_in_name(name, epoch) for name in names} - epochs
        return min((n for n in numbers if n is not None), default=None)
    return said if step is None else step


def _named_step_of(names: Sequence[str], said: int | None, epoch: int | None) -> int | None:
    named = (named_step(name, said, epoch) for name in names)
    return next((step for step in named if step is not None), None)


def _compared(checkpoints: Sequence[Found]) -> list[Found]:
    """Report checkpoints as incomplete that have fewer shards than others of their run.

    A checkpoint of fewer processes has fewer shards, but as many bytes, and is complete.
    """
    runs: dict[str, list[Found]] = {}
    for row in checkpoints:
        if row.files or shard_ids(row.name):
            runs.setdefault(family(row.name), []).append(row)
    lacking: dict[str, Found] = {}
    for run in runs.values():
        counts = [_shard_count(row) for row in run]
        most = max(counts)
        whole = min(row.size_bytes for row, count in zip(run, counts, strict=True) if count == most)
        for row, count in zip(run, counts, strict=True):
            # At least half a shard smaller than the smallest complete checkpoint.
            short = 2 * most * row.size_bytes < whole * (2 * most - 1)
            if count < most and short and counts.count(count) == 1 and row.problem is None:
                problem = InvalidInputError(
                    f"{row.name} is incomplete: it has {count} of {most} shards", hint=_WAIT
                )
                lacking[row.name] = replace(row, problem=problem)
    return [lacking.get(row.name, row) for row in checkpoints]


def _shard_count(checkpoint: Found) -> int:
    """Return the number of rank, part or shard files of a checkpoint."""
    return sum(bool(shard_ids(name)) for name in checkpoint.files or [checkpoint.name])


def _refuse_cut_off(file: InputFile, path: Path, *, alone: bool) -> None:
    """Refuse a checkpoint file that is cut off or has no tensors.

    A directory may hold other files, whatever their suffix.

    Raises:
        InvalidInputError: The file is cut off or has no tensors.
    """
    if file.format != "raw" or not (alone or file.path.endswith(TAKEN_SUFFIXES)):
        return
    if alone:
        raise InvalidInputError(
            f"{path} is not readable as tensors",
            hint="run 'ckpt commit --raw' to store its bytes as they are",
        )
    if torch_zip.starts_like_zip(file.source) or not file.source.size:
        raise InvalidInputError(f"{path} is incomplete: {file.path} is cut off")


def _sizes(path: Path) -> Iterator[int]:
    """Yield the size in bytes of each readable file at or below a path."""
    pending = [path]
    while pending:
        with contextlib.suppress(OSError):  # the caller reports an earlier problem of this path
            path = pending.pop()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield status.st_size
            elif stat.S_ISDIR(status.st_mode):
                pending += path.iterdir()
