"""Together: which files of a folder hold one checkpoint, by their names.

shards        one for each rank, part or shard:  checkpoint_1_900-shard0.pt, ...-shard1.pt
companions    a model, its optimizer, its averages:  model010000.pt, opt010000.pt
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product

from ckptvcs.checkpoint.conventions import (
    ALIAS,
    COMPANION,
    SHARD_COUNT,
    SHARED,
    Kind,
    Number,
    read_numbers,
    stem,
)

_MAX_SHARDS = 1 << 16
_Ids = tuple[int, ...]


def replaced(text: str, numbers: Iterable[Number], mark: str) -> str:
    """Text with a mark in the place of some of its numbers."""
    for one in sorted(numbers, key=lambda one: one.start, reverse=True):
        text = text[: one.start] + mark + text[one.end :]
    return text


def _shards(name: str) -> list[Number]:
    return [one for one in read_numbers(stem(name)) if one.kind is Kind.SHARD]


def shard_ids(name: str) -> _Ids:
    """The numbers of the rank, part or shard in a name."""
    return tuple(one.value for one in _shards(name))


def template(name: str) -> str:
    """A name with `*` for the numbers of ranks, parts and shards."""
    return replaced(name, _shards(name), "*").replace(SHARED, "-rank-*-")


def family(name: str) -> str:
    """What the names of the checkpoints of one run have in common: the same, without steps."""
    counts = [one for one in read_numbers(stem(name)) if one.kind not in (Kind.SHARD, Kind.OTHER)]
    plain = ALIAS.sub("#", template(replaced(name, counts, "#")))
    return re.sub(r"#(?:[-_]#)+", "#", plain)


def group_files(names: Collection[str]) -> dict[str, list[str]]:
    """Return the groups of at least two files that form one checkpoint.

    Each group has a common name, with `*` in place of the parts that differ.
    """
    templates: dict[str, list[str]] = defaultdict(list)
    counted = _counted(names)
    for name in names:
        templates[template(name) if family(name) in counted else name].append(name)
    groups: dict[str, list[str]] = {}
    for name, texts in _companion_groups(templates):
        groups[name] = sorted(member for text in texts for member in templates.pop(text))
    groups |= {text: sorted(files) for text, files in templates.items() if len(files) > 1}
    return {name: members for name, members in groups.items() if name not in names}


def _companion_groups(templates: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the templates of a model and its optimizer or average, with their common name."""
    companions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for text in templates:
        companion = _companion(text)
        if companion is not None:
            companions[companion[1]][companion[0]].append(text)
    for rest, roles in companions.items():
        if len(roles) > 1:
            texts = [text for members in roles.values() for text in members]
            endings = {text[len(stem(text)) :] for text in texts}
            yield rest + (endings.pop() if len(endings) == 1 else ""), texts


def _counted(names: Iterable[str]) -> set[str]:
    """The families whose numbers count ranks, parts or shards: from 0, or without great gaps from
    1.  Others mean something else: `lora-rank8.pt` and `lora-rank16.pt`.
    """
    found: dict[str, set[_Ids]] = defaultdict(set)
    for name in names:
        if ids := shard_ids(name):
            found[family(name)].add(ids)
    return {
        text
        for text, rows in found.items()
        if SHARD_COUNT.search(text)
        or all(
            0 in column or 2 * len(column) > max(column)
            for column in map(set, zip(*rows, strict=False))
        )
    }


def _companion(text: str) -> tuple[str, str] | None:
    """What a file is to the others of its step (`opt` of `opt010000.pt`), and what their names have
    in common; None for one that stands for itself.
    """
    short = stem(text)
    found = list(COMPANION.finditer(short))
    if len(found) != 1:
        return None
    counts = [one for one in read_numbers(short) if one.kind not in (Kind.SHARD, Kind.OTHER)]
    if not counts and not ALIAS.search(short):
        return None
    return found[0][
        0
    ].lower(), f"{short[: found[0].start()]}*{short[found[0].end() :].lstrip('-_.')}"


def is_member(name: str) -> bool:
    """Whether a file of this name may hold a checkpoint together with others."""
    return bool(_shards(name)) or _companion(template(name)) is not None


def is_numbered_piece(name: str) -> bool:
    """Whether a name says which of how many shards it is: `model-00001-of-00002.safetensors`."""
    found = SHARD_COUNT.search(template(name))
    return found is not None and found[1] is not None


def missing_files(members: Iterable[str]) -> list[str]:
    """The names of files that a group lacks for sure: those between others, and of as many as the
    names themselves say that there are.
    """
    shards: dict[str, dict[_Ids, str]] = defaultdict(dict)
    for name in members:
        if ids := shard_ids(name):
            shards[template(name)][ids] = name
    missing: list[str] = []
    for text, found in shards.items():
        if len({len(ids) for ids in found}) > 1:  # some are shared by all ranks
            continue
        columns = [_range(column) for column in zip(*found, strict=True)]
        count = SHARD_COUNT.search(text)
        if count and len(columns) == 1:
            columns = [range(columns[0].start, columns[0].start + int(count[1] or count[2]))]
        some = next(iter(found.values()))
        if 1 < _size(columns) <= _MAX_SHARDS:
            missing += [_with_ids(some, ids) for ids in product(*columns) if ids not in found]
    return missing


def _range(values: Sequence[int]) -> range:
    """The numbers of some shards and those between, which begin with 0 or 1."""
    return range(0 if 0 in values else 1, max(values) + 1)


def _size(columns: Iterable[range]) -> int:
    size = 1
    for column in columns:
        size *= len(column)
    return size


def _with_ids(name: str, ids: _Ids) -> str:
    """The name of another shard."""
    for one, value in reversed(list(zip(_shards(name), ids, strict=True))):
        name = f"{name[: one.start]}{value:0{one.digits}}{name[one.end :]}"
    return name
