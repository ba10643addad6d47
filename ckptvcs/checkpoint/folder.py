"""Folder: which entries of a folder are checkpoints, and in which order they were written.

Nothing is followed that is a symbolic link.  What is hidden or temporary is not looked at; all else
is either found or left out with a reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckptvcs.checkpoint import torchzip
from ckptvcs.checkpoint.checkpoint import InputFile, open_checkpoint
from ckptvcs.checkpoint.layout import unreadable
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_MODEL_SUFFIXES = (*_SUFFIXES, ".distcp")
_TEMPORARY = re.compile(r"\..*|tmp[-_].*|.*\.(tmp|temp|part|partial)|.*~", re.IGNORECASE)
_PIECE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)"
    r"|.*-[0-9]+-of-[0-9]+\.[a-z]+|.*\.distcp"
)
_PIECE_OF_ONE = re.compile(r"optimizer\.(bin|pt|pth)|\.metadata|.*\.distcp")
_NAMED_STEP = re.compile(
    r"(?:steps?|checkpoint|ckpt|iter(?:ation)?)[-_=.]?([0-9]{1,18})(?![0-9])", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![0-9.])([0-9]{1,18})(?![0-9]|\.[0-9])")
_NO_STEP = re.compile(r"(v|fp|bf|int|float)\Z", re.IGNORECASE)  # v2, bf16


@dataclass(frozen=True)
class Found:
    """A checkpoint in a folder, by its name there: a `file` or a `directory`, its bytes, its step;
    `said` is the step that it gives itself, `problem` why it cannot be committed.
    """

    name: str
    path: Path
    kind: str
    size_bytes: int
    step: int | None
    said: int | None = None
    problem: CkptError | None = None


@dataclass(frozen=True)
class LeftOut:
    """An entry of a folder that is no checkpoint, and why."""

    name: str
    reason: str


def survey(folder: Path, pattern: str | None, store: Path) -> tuple[list[Found], list[LeftOut]]:
    """The checkpoints in a folder, by step, and by name where that is the same or unknown: numbers
    in names count as such.  What is left out has been matched by `pattern` (a glob) too.

    A step is what the name calls so (`step-900`, `checkpoint-900`), else what the checkpoint says,
    else the last whole number of the name.  Where a checkpoint whose name has no step says the same
    as one whose name has, it is of that step too: steps inside may count from 0, or names
    count epochs.

    Raises:
        NotFoundError: there is no such folder, or nothing in it that could be committed.
        InvalidInputError: it is a checkpoint itself, or it is in the `store`.
    """
    if folder.resolve().is_relative_to(store):
        raise InvalidInputError(f"{folder} is part of the repository itself")
    found: list[Found] = []
    left: list[LeftOut] = []
    for entry in _entries(folder):
        own = _PIECE_OF_ONE.fullmatch(entry.name)
        if pattern is None and own and entry.is_file(follow_symlinks=False):
            raise InvalidInputError(
                f"{folder} is a checkpoint itself: it holds {entry.name}",
                hint=f"ckpt commit {folder}; or say with --pattern what is to be imported",
            )
        if _TEMPORARY.fullmatch(entry.name) or not fnmatchcase(entry.name, pattern or "*"):
            continue
        reason = _why_not(entry, store)
        if reason is None:
            found.append(_look_at(entry, store))
        else:
            left.append(LeftOut(entry.name, reason))
    if not found:
        why = f": {left[0].name} is {left[0].reason}" if len(left) == 1 else ""
        raise NotFoundError(
            f"no checkpoints in {folder}{why}",
            hint=f"names end in {', '.join(_SUFFIXES)}; directories hold such files",
        )
    return sorted(_agreed(found), key=_order), left


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
        one if _is_named(one) or one.said is None
        else replace(one, step=named.get(one.said, one.step))
        for one in found
    ]  # fmt: skip


def _is_named(found: Found) -> bool:
    return _NAMED_STEP.search(found.name) is not None


def _order(found: Found) -> tuple[bool, int, bool, list[tuple[int, str]]]:
    """By step, those without one last, and before a copy (`best.pt`) what is named by that step;
    then by name, digits as numbers, and `step-1.pt` before `step-1-ema.pt`.
    """
    parts = re.split(r"([0-9]+)", Path(found.name).stem)
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
    if _PIECE.fullmatch(entry.name):
        return "a piece of a checkpoint, not one by itself"
    if not entry.name.endswith(_SUFFIXES):
        return f"no {', '.join(_SUFFIXES)}"
    return None


def _why_no_directory(path: Path, store: Path) -> str | None:
    try:
        entries = [e for e in _entries(path) if not e.is_symlink()]
        if store.is_relative_to(path.resolve()) or any(e.name.lower() == ".ckpt" for e in entries):
            return "a folder with a repository in it"
        if not _hold_model(entries):
            return "a folder without model files"
    except CkptError as error:
        return f"a folder that cannot be read: {error.message}"
    steps = {
        named[-1] for entry in entries
        if (entry.is_dir(follow_symlinks=False) or entry.name.endswith(_SUFFIXES))
        and not _PIECE.fullmatch(entry.name) and (named := _NAMED_STEP.findall(entry.name))
    }  # fmt: skip
    if len(steps) > 1 or (steps and not _NAMED_STEP.search(path.name)):
        return "a folder of checkpoints, to be imported by itself"
    return None


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
    stem = entry.name if is_directory else path.stem
    named = [int(number) for number in _NAMED_STEP.findall(stem)][-1:]
    try:
        checkpoint = open_checkpoint(path, skip=store)
        for file in checkpoint.files:
            _refuse_cut_off(file, path, alone=not is_directory)
    except CkptError as error:
        step = next(iter(named), None)
        return Found(entry.name, path, kind, sum(_sizes(path)), step, problem=error)
    said = checkpoint.step
    step = next(iter([*named, *([] if said is None else [said]), *_numbers(stem)]), None)
    return Found(entry.name, path, kind, checkpoint.size_bytes, step, said)


def _numbers(stem: str) -> list[int]:
    """The last whole number of a name, in a list; none where that is a version or a type."""
    found = [m for m in _NUMBER.finditer(stem) if not _NO_STEP.search(stem[: m.start()])]
    return [int(match[1]) for match in found[-1:]]


def _refuse_cut_off(file: InputFile, path: Path, *, alone: bool) -> None:
    """Raises InvalidInputError where what should be a checkpoint has no structure.  In a directory
    files of any other kind are fine, whatever their names end in.
    """
    if file.format != "raw" or not (alone or file.path.endswith(_SUFFIXES)):
        return
    if alone:
        raise InvalidInputError(
            f"{path} has no structure that can be read",
            hint="'ckpt commit' stores its bytes as they are",
        )
    like_zip = file.source.size > 0 and torchzip.starts_like_zip(file.source)
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
