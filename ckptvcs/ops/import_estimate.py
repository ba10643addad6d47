"""Estimate what an import would store, before it stores anything.

The first two checkpoints of each branch are committed to a temporary repository with the same
settings, and verified there.  The first one shows the size of a keyframe, the second one the size
of a delta.  The others are assumed to be like them.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.checkpoint.survey import Found
from ckptvcs.errors import CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.gc.retention import PATCHED_PARTS
from ckptvcs.ops.commit import commit_path
from ckptvcs.ops.originals import Keeper
from ckptvcs.ops.repository import CONFIG, Repository
from ckptvcs.ops.request import Request
from ckptvcs.parallel import Progress
from ckptvcs.store.disk import free_bytes, scratch_folder
from ckptvcs.store.ids import ObjectId

_SAMPLES = 2  # of a branch: a keyframe and a delta
_TRIES = 4  # checkpoints of a branch; some may be unreadable
_BRANCHES = 3  # the others are assumed to be like the largest one
_ROOM = 2  # bytes of the temporary repository, over those of its checkpoints
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Forecast:
    """The estimated commit of a checkpoint, as it would be at the end of the import.

    Attributes:
        stored_bytes: The bytes on disk, without the exact patch.
        exact_bytes: The bytes of the exact patch; 0 if it needs none, or does not keep it.
        exact: Whether every file can be restored bit for bit.
        exact_lasts: Whether newer commits leave it exact.
        weight_rel: The relative error of the weights in the near form.
    """

    stored_bytes: int
    exact_bytes: int
    exact: bool
    exact_lasts: bool
    weight_rel: float


@dataclass(frozen=True)
class Estimate:
    """How an estimate was made, and how long the import would take.

    Attributes:
        sampled: The names of the checkpoints that were encoded.
        seconds: The time of the import in seconds.
    """

    sampled: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Group:
    """The new checkpoints of one branch, in order; `tip` is its newest commit."""

    tip: ObjectId | None
    members: Sequence[Found]

    @property
    def size_bytes(self) -> int:
        """The bytes of all its checkpoints."""
        return sum(found.size_bytes for found in self.members)


@dataclass(frozen=True)
class _Sample:
    """An encoded checkpoint: its sizes in bytes, and the parts that need an exact patch."""

    name: str
    raw_bytes: int
    stored_bytes: int
    patch_bytes: int
    patched: frozenset[str]
    weight_rel: float
    seconds: float


def forecast(
    repo: Repository, groups: Sequence[Group], codec: str | None, *, pins: bool, progress: Progress
) -> tuple[Estimate, dict[str, Forecast]] | None:
    """Return an estimate, and a forecast for each checkpoint by name.

    Args:
        repo: The repository that the import would write to.
        groups: The new checkpoints.
        codec: The codec; None is the configured one.
        pins: Whether the import would pin commits that are exact only through a patch.
        progress: Called with the number of bytes that were processed since its last call.

    Returns:
        None if no temporary directory has room, or no checkpoint can be encoded.
    """
    groups = sorted(groups, key=lambda group: -group.size_bytes)
    samples: list[list[_Sample]] = []
    for group in groups[:_BRANCHES]:
        try:
            samples.append(list(_samples(repo, group, codec, progress)))
        except OSError:  # no temporary directory has room
            break
    largest = next((rows for rows in samples if rows), None)
    if largest is None:
        return None
    forecasts: dict[str, Forecast] = {}
    seconds = 0.0
    for number, group in enumerate(groups):
        rows = samples[number] if number < len(samples) and samples[number] else largest
        forecasts |= _forecasts(repo, group, rows, pins=pins)
        seconds += rows[-1].seconds * group.size_bytes / max(1, rows[-1].raw_bytes)
    sampled = tuple(row.name for rows in samples for row in rows)
    return Estimate(sampled, seconds), forecasts


def _samples(
    repo: Repository, group: Group, codec: str | None, progress: Progress
) -> Iterator[_Sample]:
    """Commit the first checkpoints of a group to a temporary repository, and verify them."""
    sizes = [found.size_bytes for found in group.members[:_TRIES]]
    with scratch_folder("ckpt-import-", _room(repo, _ROOM * sum(sizes[:_SAMPLES]))) as folder:
        scratch = Repository.init(folder)
        with contextlib.suppress(FileNotFoundError):  # all settings are defaults
            shutil.copyfile(repo.folder / CONFIG, scratch.folder / CONFIG)
        scratch = Repository(scratch.folder)
        count = 0
        for found in group.members[:_TRIES]:
            with contextlib.suppress(InvalidInputError, NotFoundError, CorruptionError):
                yield _sample(scratch, found, codec, progress)
                count += 1
            if count == _SAMPLES:
                return


def _sample(repo: Repository, found: Found, codec: str | None, progress: Progress) -> _Sample:
    start = time.monotonic()
    request = Request(found.name, found.step, codec=codec)
    result = commit_path(repo, found.path, request, files=found.files, progress=progress)
    Keeper(repo, codec).is_exact(result.id)
    seconds = time.monotonic() - start
    commit = result.commit
    return _Sample(
        found.name,
        found.size_bytes,
        repo.entry(result.id).stored_bytes,
        commit.patch_bytes,
        frozenset(name for name, part in commit.parts.items() if part.exact is not None),
        commit.error.weight_rel,
        seconds,
    )


def _room(repo: Repository, size_bytes: int) -> Path:
    """Return a temporary directory with this much room, if possible on another disk.

    Raises:
        OSError: There is none.
    """
    folders = [_MEMORY]
    with contextlib.suppress(OSError):  # it is full
        folders.insert(0, Path(tempfile.gettempdir()))
    full = repo.folder.stat().st_dev
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_dev == full):
        if free_bytes(folder) >= size_bytes:
            return folder
    raise FileNotFoundError("no temporary directory has room")


def _forecasts(
    repo: Repository, group: Group, samples: Sequence[_Sample], *, pins: bool
) -> dict[str, Forecast]:
    config = repo.commit_config()
    rule = config.exact_rule
    first, later = samples[0], samples[-1]
    depth = None if group.tip is None else repo.catalog.commit(group.tip).depth
    deltas = 0.0
    rows = {}
    for place, found in enumerate(group.members):
        limit = config.keyframe_bytes * first.stored_bytes
        is_keyframe = depth is None or depth >= config.keyframe_depth or deltas > limit
        sample = first if is_keyframe else later
        scale = found.size_bytes / max(1, sample.raw_bytes)
        stored = round(sample.stored_bytes * scale)
        depth = 0 if is_keyframe or depth is None else depth + 1
        deltas = 0.0 if is_keyframe else deltas + stored
        lasts = not sample.patched
        if pins and rule.wants_patch({}) and sample.patched <= PATCHED_PARTS[rule.pin_fidelity]:
            lasts = True
        is_newest = place >= len(group.members) - rule.newest
        exact = lasts or is_newest
        patch = round(sample.patch_bytes * scale) if exact else 0
        rows[found.name] = Forecast(stored, patch, exact, lasts, sample.weight_rel)
    return rows
