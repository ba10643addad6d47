"""Find the checkpoints in a folder, and the order in which they were written.

Several files of one checkpoint count as one (`grouping.py`).  The survey does not follow symbolic
links and ignores hidden and temporary entries.  Any other entry is a checkpoint or is left out with
a reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckptvcs.checkpoint import torch_zip
from ckptvcs.checkpoint.conventions import (
    FOLDER_OF_ONE,
    PIECE,
    PIECE_OF_ONE,
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

_MODEL_SUFFIXES = (*TAKEN_SUFFIXES, ".distcp")
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
class LeftOut:
    """An entry of a folder that is not a checkpoint.

    Attributes:
        name: The name of the entry.
        reason: Why it is not a checkpoint.
    """

    name: str
    reason: str


def survey(folder: Path, pattern: str | None, store: Path) -> tuple[list[Found], list[LeftOut]]:
    """The checkpoints in a folder, by step, and by name where that is the same or unknown: numbers
    in names count as such.  What is left out has been matched by `pattern` (a glob) too.

    A step is what the name calls so (`step-900`, `checkpoint-900`), else what the checkpoint says,
    else a number of the name that is no epoch, shard, size or version.  Where a checkpoint whose
    name has no step says the same as one whose name has, it is of that step too: steps inside may
    count from 0, or names count epochs.

    Raises:
        NotFoundError: there is no such folder, or nothing in it that could be committed.
        InvalidInputError: it is a checkpoint itself, or it is in the `store`.
    """
    if real_path(folder).is_relative_to(store):
        raise InvalidInputError(f"{folder} is part of the repository itself")
    entries = _entries(folder)
    if pattern is None:
        _refuse_checkpoint(folder, entries)
    found: list[Found] = []
    left: list[LeftOut] = []
    groups = {
        name: members
        for name, members in _groups(entries, pattern).items()
        if _stands_alone(name, members)
    }
    grouped = {member for members in groups.values() for member in members}
    for entry in entries:
        if not _is_looked_at(entry.name, pattern) or entry.name in grouped:
            continue
        reason = _why_not(entry, store)
        if reason is None:
            found.append(_look_at(entry, store))
        else:
            left.append(LeftOut(entry.name, reason))
    found += [_look_at_group(folder, name, members) for name, members in groups.items()]
    if not found:
        why = f": {left[0].name} is {left[0].reason}" if len(left) == 1 else ""
        raise NotFoundError(
            f"no checkpoints in {folder}{why}",
            hint=f"names end in {', '.join(SUFFIXES)}; directories hold such files",
        )
    return sorted(_agreed(_compared(found)), key=_order), left


def _refuse_checkpoint(folder: Path, entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        if _shows_a_checkpoint(entry):
            raise InvalidInputError(
                f"{folder} is a checkpoint itself: it holds {entry.name}",
                hint=f"ckpt commit {folder}; or say with --pattern what is to be imported",
            )


def candidates(folder: Path, pattern: str | None, store: Path) -> dict[str, list[str]]:
    """What `survey` may find in a folder, complete or not: the name of each, and the entries of the
    folder that it is.  Nothing where there is no such folder yet.

    Raises:
        InvalidInputError: it cannot be read, or is a file.
    """
    try:
        entries = _entries(folder)
    except NotFoundError:
        return {}
    groups = _groups(entries, pattern)
    grouped = {member for members in groups.values() for member in members}
    alone = {
        entry.name: [entry.name]
        for entry in entries
        if entry.name not in grouped
        and _is_looked_at(entry.name, pattern)
        and _why_not(entry, store) is None
    }
    return groups | alone


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
    """Whether a group is a checkpoint: shards of a model without a step may be part of a directory,
    and count only where all of them are here.
    """
    return not is_numbered_piece(members[0]) or (
        named_step(group) is not None or not missing_files(members)
    )


def _is_looked_at(name: str, pattern: str | None) -> bool:
    return not TEMPORARY.fullmatch(name) and fnmatchcase(name, pattern or "*")


def _shows_a_checkpoint(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is what only a folder has that is one checkpoint."""
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
            f"{folder} is a file", hint="'ckpt commit' takes a single checkpoint"
        ) from None
    except OSError as error:
        raise unreadable(folder, error) from error


def _agreed(found: list[Found]) -> list[Found]:
    """The same, where what a checkpoint says of its step is put as the names of others put it."""
    named = {one.said: one.step for one in found if _is_named(one)}
    return [
        one
        if _is_named(one) or one.said is None
        else replace(one, step=named.get(one.said, one.step))
        for one in found
    ]


def _is_named(found: Found) -> bool:
    return named_step(found.name, found.said) is not None


def _order(found: Found) -> tuple[bool, int, bool, list[tuple[int, str]]]:
    """By step, those without one last, and before a copy (`best.pt`) what is named by that step;
    then by name, digits as numbers, and `step-1.pt` before `step-1-ema.pt`.
    """
    parts = re.split(r"([0-9]+)", stem(found.name))
    natural = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return found.step is None, found.step or 0, not _is_named(found), natural


# -- what is none ----------------------------------------------------------------------------------


def _why_not(entry: os.DirEntry[str], store: Path) -> str | None:
    """Why an entry is not taken for a checkpoint; None if it is."""
    if entry.is_symlink():
        return "a symbolic link"
    if entry.is_dir(follow_symlinks=False):
        return _why_no_directory(Path(entry.path), store)
    if not entry.is_file(follow_symlinks=False):
        return "neither a file nor a directory"
    if PIECE.fullmatch(entry.name):
        return "a piece of a checkpoint, not one by itself"
    if not entry.name.endswith(TAKEN_SUFFIXES):
        return f"no {', '.join(SUFFIXES)}"
    return "a tar archive" if _is_archive(Path(entry.path)) else None


def _is_archive(path: Path) -> bool:
    """Whether a file is a real tar archive; `model.pth.tar` of torch.save is none."""
    try:
        with path.open("rb") as file:
            file.seek(_TAR_MAGIC)
            return path.name.endswith(".tar") and file.read(5) == b"ustar"
    except OSError:
        return False  # what is wrong with it is said when it is opened


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
        return "a folder of checkpoints, to be imported by itself"
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
    """Whether there is a model file among these, or below them."""
    left = list(entries)
    while left:
        entry = left.pop()
        if entry.is_dir(follow_symlinks=False):
            left += _entries(Path(entry.path))
        elif entry.is_file(follow_symlinks=False) and entry.name.endswith(_MODEL_SUFFIXES):
            return True
    return False


# -- what is one -----------------------------------------------------------------------------------


def _look_at(entry: os.DirEntry[str], store: Path) -> Found:
    path = Path(entry.path)
    is_directory = entry.is_dir(follow_symlinks=False)
    kind = "directory" if is_directory else "file"
    try:
        checkpoint = open_checkpoint(path, skip=store)
        for file in checkpoint.files:
            _refuse_cut_off(file, path, alone=not is_directory)
    except CkptError as error:
        step = named_step(entry.name)
        return Found(entry.name, path, kind, sum(_sizes(path)), step, problem=error)
    step = _step_of([entry.name], checkpoint)
    return Found(entry.name, path, kind, checkpoint.size_bytes, step, checkpoint.step)


def _look_at_group(folder: Path, name: str, members: Sequence[str]) -> Found:
    """What some files hold together: one problem, if there are any."""
    files = tuple(members)
    try:
        missing = missing_files(members)
        if missing:
            raise _incomplete(name, missing, "missing")
        checkpoint = open_checkpoint(folder, only=members)
        cut = [file.path for file in checkpoint.files if file.format == "raw"]
        if cut:
            raise _incomplete(name, cut, "empty or cut off")
    except CkptError as error:
        size = sum(size for member in members for size in _sizes(folder / member))
        step = _named_step_of(members, None, None)
        return Found(name, folder, "directory", size, step, problem=error, files=files)
    step = _step_of(members, checkpoint)
    size = checkpoint.size_bytes
    return Found(name, folder, "directory", size, step, checkpoint.step, files=files)


def _incomplete(name: str, files: Sequence[str], what: str) -> InvalidInputError:
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    listed = ", ".join(files[:_LISTED]) + more
    return InvalidInputError(
        f"{name} is incomplete: {listed} {'is' if len(files) == 1 else 'are'} {what}", hint=_WAIT
    )


def _step_of(names: Sequence[str], checkpoint: Checkpoint) -> int | None:
    """The step of a checkpoint by the names of its files and by what it says."""
    said, epoch = checkpoint.step, checkpoint.epoch
    step = _named_step_of(names, said, epoch)
    if step is None and said is None:
        epochs = {one for name in names for one in epochs_in_name(name)}
        numbers = {number_in_name(name, epoch) for name in names} - epochs
        return min((n for n in numbers if n is not None), default=None)
    return said if step is None else step


def _named_step_of(names: Sequence[str], said: int | None, epoch: int | None) -> int | None:
    named = (named_step(name, said, epoch) for name in names)
    return next((step for step in named if step is not None), None)


def _compared(found: Sequence[Found]) -> list[Found]:
    """The same, where a checkpoint that has fewer shards than the others of its run is known to be
    incomplete: one that was written by fewer processes has as many bytes.
    """
    runs: dict[str, list[Found]] = {}
    for one in found:
        if one.files or shard_ids(one.name):
            runs.setdefault(family(one.name), []).append(one)
    lacking: dict[str, Found] = {}
    for run in runs.values():
        counts = [_shard_count(one) for one in run]
        most = max(counts)
        whole = min(one.size_bytes for one, count in zip(run, counts, strict=True) if count == most)
        for one, count in zip(run, counts, strict=True):
            # Half a shard less than those that have all of them.
            short = 2 * most * one.size_bytes < whole * (2 * most - 1)
            if count < most and short and counts.count(count) == 1 and one.problem is None:
                problem = InvalidInputError(
                    f"{one.name} is incomplete: it has {count} of {most} shards", hint=_WAIT
                )
                lacking[one.name] = replace(one, problem=problem)
    return [lacking.get(one.name, one) for one in found]


def _shard_count(found: Found) -> int:
    """How many files of ranks, parts or shards hold a checkpoint."""
    return sum(bool(shard_ids(name)) for name in found.files or [found.name])


def _refuse_cut_off(file: InputFile, path: Path, *, alone: bool) -> None:
    """Raises InvalidInputError where what should be a checkpoint has no structure.  In a directory
    files of any other kind are fine, whatever their names end in.
    """
    if file.format != "raw" or not (alone or file.path.endswith(TAKEN_SUFFIXES)):
        return
    if alone:
        raise InvalidInputError(
            f"{path} has no structure that can be read",
            hint="'ckpt commit' stores its bytes as they are",
        )
    like_zip = file.source.size > 0 and torch_zip.starts_like_zip(file.source)
    if like_zip or not file.source.size or file.path.endswith(".safetensors"):
        raise InvalidInputError(f"{path} is incomplete: {file.path} is cut off")


def _sizes(path: Path) -> Iterator[int]:
    """The bytes of each file at or below a path, as far as they can be told."""
    left = [path]
    while left:
        with contextlib.suppress(OSError):  # it has a problem already, which is what will be said
            path = left.pop()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield status.st_size
            elif stat.S_ISDIR(status.st_mode):
                left += path.iterdir()
