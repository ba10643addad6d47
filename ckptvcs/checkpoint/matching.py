"""Match the tensors of two commits if the paths of their files contain the step.

DeepSpeed writes `checkpoint-500/global_step500/...`, Megatron `iter_0000500/...`.  All tensor names
of such a directory differ from commit to commit, although the model is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ckptvcs.checkpoint.conventions import Kind, Number, read_numbers, stem
from ckptvcs.checkpoint.grouping import replaced

_COUNTS = (Kind.STEP, Kind.CHECKPOINT, Kind.ATTACHED, Kind.NUMBER, Kind.LOOSE)
_LEAST_SHARED = 100  # a smaller number without a word may equal the step by chance
_Form = tuple[str, tuple[int, ...]]


def alike(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return the names in `new`, each with the name of the same tensor in `old`.

    The names are equal, or differ only in the step or epoch in the file path before the colon
    (`global_step100/model.pt:w` and `global_step200/model.pt:w`).  If several names in `old`
    differ only so, the one with the highest step matches.
    """
    old_names = set(old)
    matches = {name: name for name in new if name in old_names}
    if len(matches) < len(set(new)):
        latest: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, (form, steps) in _forms(old).items():
            latest[form] = max(latest.get(form, ((), "")), (steps, name))
        for name, (form, _) in _forms(new).items():
            if name not in matches and form in latest:
                matches[name] = latest[form][1]
    return matches


def pair_names(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Match names as `alike` does, but one to one: ambiguous names have no match."""
    same = set(old) & set(new)
    matches = {name: name for name in same}
    if len(same) < max(len(set(old)), len(set(new))):
        sides: tuple[dict[str, list[str]], ...] = (defaultdict(list), defaultdict(list))
        for side, names in zip(sides, (old, new), strict=True):
            for name, (form, _) in _forms(names).items():
                if name not in same:
                    side[form].append(name)
        for form, names in sides[1].items():
            if len(names) == 1 == len(sides[0].get(form, ())):
                matches[names[0]] = sides[0][form][0]
    return matches


def _forms(names: Sequence[str]) -> dict[str, _Form]:
    """Return each name with `*` for the steps in its file path, and these steps."""
    paths = {name: name.partition(":")[0] if ":" in name else "" for name in names}
    numbers = {path: list(_path_numbers(path)) for path in set(paths.values())}
    steps = _Steps(list(numbers.values()))
    forms: dict[str, _Form] = {}
    for path, row in numbers.items():
        counts = [placed.number for placed in row if steps.include(placed)]
        forms[path] = replaced(path, counts, "*"), tuple(number.value for number in counts)
    return {
        name: (forms[path][0] + name[len(path) :], forms[path][1]) for name, path in paths.items()
    }


class _Steps:
    """The steps and epochs that all file paths with numbers share.

    A number without a word such as `step` counts only if no path has such a word.
    """

    def __init__(self, rows: Sequence[Sequence[_Placed]]) -> None:
        sure = [{placed.number.value for placed in row if placed.number.is_sure} for row in rows]
        plain = [{placed.number.value for placed in row if placed.counts} for row in rows]
        self._any_sure = any(sure)
        self._steps = _shared(sure if self._any_sure else plain)
        self._epochs = _shared(
            {placed.number.value for placed in row if placed.number.kind is Kind.EPOCH}
            for row in rows
        )
        self._folders: dict[int, set[str]] = defaultdict(set)
        for placed in chain.from_iterable(rows):
            if placed.number.is_sure and placed.folder:
                self._folders[placed.depth].add(placed.folder)

    def include(self, placed: _Placed) -> bool:
        """Return whether the number is one of these steps or epochs."""
        number = placed.number
        if number.kind is Kind.EPOCH:
            return number.value in self._epochs
        if number.is_sure and not self._steps:
            return True  # the paths have different steps
        by_chance = (self._any_sure and not number.is_sure) or len(self._folders[placed.depth]) > 1
        least = _LEAST_SHARED if by_chance else 0
        return placed.counts and number.value in self._steps and number.value >= least


def _shared(values: Iterable[set[int]]) -> set[int]:
    """Return the intersection of the sets that are not empty."""
    filled = [row for row in values if row]
    return set.intersection(*filled) if filled else set()


@dataclass(frozen=True)
class _Placed:
    """A number in a path, its depth, and the name of the `folder` that contains it."""

    number: Number
    depth: int
    folder: str

    @property
    def counts(self) -> bool:
        """Return whether the number may be a step."""
        return self.number.kind in _COUNTS


def _path_numbers(path: str) -> Iterator[_Placed]:
    at = 0
    parts = path.split("/")
    for depth, part in enumerate(parts):
        folder = part if depth + 1 < len(parts) else ""
        for number in read_numbers(stem(part)):
            moved = replace(number, start=at + number.start, end=at + number.end)
            yield _Placed(moved, depth, folder)
        at += len(part) + 1
