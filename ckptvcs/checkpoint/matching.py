"""Alike: the same tensor in two commits, where the path of its file holds the step.

DeepSpeed writes `checkpoint-500/global_step500/...`, Megatron `iter_0000500/...`: the names of all
tensors of a directory differ from commit to commit, and what they hold is the same model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckptvcs.checkpoint.conventions import Kind, Number, read_numbers, stem
from ckptvcs.checkpoint.grouping import replaced

_COUNTS = (Kind.STEP, Kind.CHECKPOINT, Kind.ATTACHED, Kind.NUMBER, Kind.LOOSE)
_LEAST_SHARED = 100  # a smaller number without a word may be the step by chance
_Form = tuple[str, tuple[int, ...]]


def alike(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """For each name of a tensor in `new` the name of the same one in `old`: the same name, or else
    one that differs in nothing but the step, or the epoch, in the path of its file, which stands
    before a colon: as `global_step100/model.pt:w` differs from `global_step200/model.pt:w`.

    Where several differ so, that of the highest step is meant.
    """
    known = set(old)
    found = {name: name for name in new if name in known}
    if len(found) < len(set(new)):
        there: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, (form, steps) in _forms(old).items():
            there[form] = max(there.get(form, ((), "")), (steps, name))
        for name, (form, _) in _forms(new).items():
            if name not in found and form in there:
                found[name] = there[form][1]
    return found


def pair_names(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """The same, but each name goes with one other, or with none where several could be meant."""
    same = set(old) & set(new)
    found = {name: name for name in same}
    if len(same) < max(len(set(old)), len(set(new))):
        sides: tuple[dict[str, list[str]], ...] = (defaultdict(list), defaultdict(list))
        for side, names in zip(sides, (old, new), strict=True):
            for name, (form, _) in _forms(names).items():
                if name not in same:
                    side[form].append(name)
        for form, names in sides[1].items():
            if len(names) == 1 == len(sides[0].get(form, ())):
                found[names[0]] = sides[0][form][0]
    return found


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
    """The steps and epochs that all file paths with any numbers share.

    A number without a word such as `step` counts only if no path has such a word.
    """

    def __init__(self, rows: Sequence[Sequence[_Placed]]) -> None:
        sure = [{one.number.value for one in row if one.number.is_sure} for row in rows]
        plain = [{one.number.value for one in row if one.counts} for row in rows]
        self._any_sure = any(sure)
        self._steps = _shared(sure if self._any_sure else plain)
        self._epochs = _shared(
            {one.number.value for one in row if one.number.kind is Kind.EPOCH} for row in rows
        )
        self._folders: dict[int, set[str]] = defaultdict(set)
        for row in rows:
            for one in row:
                if one.number.is_sure and one.folder:
                    self._folders[one.depth].add(one.folder)

    def include(self, placed: _Placed) -> bool:
        """Return whether a number is one of these steps or epochs."""
        number = placed.number
        if number.kind is Kind.EPOCH:
            return number.value in self._epochs
        if number.is_sure and not self._steps:
            return True  # each path has a step of its own
        by_chance = (self._any_sure and not number.is_sure) or len(self._folders[placed.depth]) > 1
        least = _LEAST_SHARED if by_chance else 0
        return placed.counts and number.value in self._steps and number.value >= least


def _shared(values: Iterable[set[int]]) -> set[int]:
    """What all of these have that have anything."""
    some = [one for one in values if one]
    return set.intersection(*some) if some else set()


@dataclass(frozen=True)
class _Placed:
    """A number in a path, how deep it stands there, and the name of the `folder` that it is in."""

    number: Number
    depth: int
    folder: str

    @property
    def counts(self) -> bool:
        """Whether it may be a step."""
        return self.number.kind in _COUNTS


def _path_numbers(path: str) -> Iterator[_Placed]:
    at = 0
    parts = path.split("/")
    for depth, part in enumerate(parts):
        folder = part if depth + 1 < len(parts) else ""
        for one in read_numbers(stem(part)):
            yield _Placed(Number(at + one.start, at + one.end, one.value, one.kind), depth, folder)
        at += len(part) + 1
