"""Export: write commits as new files, in their own format or another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.conventions import SAFETENSORS_SUFFIX, SUFFIXES
from ckptvcs.decode.trajectory import export as write_commits
from ckptvcs.errors import InvalidInputError, NotFoundError
from ckptvcs.files.targets import Targets
from ckptvcs.history.commit import PARTS, Commit
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import Progress
from ckptvcs.store.ids import ObjectId

_FOREIGN = frozenset(
    (".npz", ".npy", ".onnx", ".h5", ".hdf5", ".keras", ".gguf", ".tflite", ".pkl", ".zip", ".tar")
)
"""Suffixes of files of other programs, which no directory gets by intention."""
FORMATS = ("pt", "safetensors")


@dataclass(frozen=True)
class Exported:
    """An exported commit.

    Attributes:
        entry: The commit.
        path: The written file or directory.
        exact: Whether the file has exactly the committed values.
    """

    entry: LogEntry
    path: Path
    exact: bool


def export(
    repository: Repository,
    names: Sequence[ObjectId],
    paths: Sequence[Path],
    only: str | None,
    progress: Progress,
    *,
    force: bool,
) -> list[Exported]:
    """Write each commit to its path; see `Repo.export`."""
    check_part(only)
    if not names:
        raise NotFoundError("no commits in this range", hint="run 'ckpt log' to list them")
    entries = [repository.entry(name) for name in names]
    with Targets() as looks:
        targets = [looks.free(path, force=force) for path in paths]
        write_commits(repository.catalog, names, targets, only, progress, force=force)
    return [
        Exported(entry, path, entry.fidelity.get(only, "") == "exact" if only else entry.exact)
        for entry, path in zip(entries, paths, strict=True)
    ]


def suffix_fits(commit: Commit, path: Path) -> bool:
    """Return whether the committed files can be written to `path` as they are.

    False means that the suffix names the other format of weights: torch or safetensors.

    Raises:
        InvalidInputError: the suffix names neither a format nor the committed file.
    """
    suffix, formats = path.suffix, {file.format for file in commit.files if file.skeleton}
    own = _own_suffixes(commit, suffix)
    if suffix in own or own.intersection(path.suffixes) or not suffix[1:2].isalpha():
        return True
    others = sorted(own - {"", *SUFFIXES})
    if suffix not in SUFFIXES:
        known = " or ".join((".pt", SAFETENSORS_SUFFIX, *others))
        raise InvalidInputError(f"{path} has an unknown suffix", hint=f"use {known}")
    if formats == {"raw"}:
        raise InvalidInputError(
            f"{path} cannot be written: the commit holds no tensors",
            hint=f"use the suffix {others[0]}" if others else "leave out the suffix",
        )
    is_alike = (formats == {"safetensors"}) == (suffix == SAFETENSORS_SUFFIX)
    return commit.source != "directory" and is_alike


def _own_suffixes(commit: Commit, suffix: str) -> set[str]:
    """Return suffixes that keep the committed format; a directory may have almost any."""
    if commit.source == "directory":
        return {""} if suffix in _FOREIGN else {"", suffix} - set(SUFFIXES)
    return {"", *(Path(file.path).suffix for file in commit.files if file.skeleton)}


def check_part(only: str | None) -> None:
    """Raise InvalidInputError unless a part is known."""
    if only not in (None, *PARTS):
        raise InvalidInputError(f"unknown part '{only}'", hint=f"use {' or '.join(PARTS)}")


def check_form(form: str | None) -> None:
    """Raise InvalidInputError unless a format is known."""
    if form not in (None, *FORMATS):
        raise InvalidInputError(f"unknown format '{form}'", hint=f"use {' or '.join(FORMATS)}")


def file_path(path: Path, form: str | None) -> Path:
    """Return the path for a commit; the format `safetensors` adds its suffix."""
    check_form(form)
    if form and path.suffix == ".safetensors" and form != "safetensors":
        raise InvalidInputError(f"{path} has the wrong suffix for --format {form}")
    if form == "safetensors" and path.suffix != ".safetensors":
        return path.with_name(f"{path.name}.safetensors")
    return path


def file_paths(
    repository: Repository,
    names: Sequence[ObjectId],
    folder: Path,
    form: str | None,
    only: str | None,
) -> list[Path]:
    """Return a path for each commit: its step, and its id if the step is not unique."""
    check_form(form)
    commits = [repository.catalog.commit(name) for name in names]
    steps = Counter(commit.step for commit in commits)
    paths = []
    for name, commit in zip(names, commits, strict=True):
        stem = f"commit-{name[:8]}" if commit.step is None else f"step-{commit.step}"
        if commit.step is not None and steps[commit.step] > 1:
            stem += f"-{name[:8]}"
        suffix = form or "pt"
        if form is None and all(f.format == "safetensors" for f in commit.files):
            suffix = "safetensors"
        is_directory = form is None and only is None and commit.source == "directory"
        paths.append(folder / (stem if is_directory else f"{stem}.{suffix}"))
    return paths
