"""Group files of a folder into checkpoints, by their names.

shards        one file for each rank, part or shard:  checkpoint_1_900-shard0.pt, ...-shard1.pt
companions    a model, its optimizer, its averages:   model010000.pt, opt010000.pt
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product

from ckptvcs.checkpoint.conventions import ALIAS, Kind, Number, counts_in_name, read_numbers, stem

_COMPANION = re.compile(
    r"(?<![A-Za-z])(?:net[-_]?[gd]|extra[-_]states?|(?:model|optim(?:izer)?|training)[-_]states?"
    r"|ema(?:[-_]0\.[0-9]+)?|models?|net|network|weights|params|optim(?:izer)?s?|opt|scheduler"
    r"|sched|scaler|trainer|generator|discriminator|actor|critic|policy|stats"
    r"|\A[gd](?=[-_][0-9])|\Aepoch(?=[-_][0-9]))(?![A-Za-z])",
    re.IGNORECASE,
)
"""The word that distinguishes files of one step: `ema_0.9999_010000.pt`, `opt010000.pt`."""

_SHARD_COUNT = re.compile(
    r"\*[-_]?of[-_]?([0-9]{1,9})|world[-_]?size[-_]?([0-9]{1,9})", re.IGNORECASE
)
"""The count of shards in a name that has `*` for the shard's own number."""

_SHARED = "-shared-"
"""fairseq writes this in place of `-rank-0-` if all ranks have the same data."""

_MAX_SHARDS = 1 << 16
_Ids = tuple[int, ...]


def replaced(text: str, numbers: Iterable[Number], mark: str) -> str:
    """Return the text with a mark in place of each of these numbers."""
    for number in sorted(numbers, key=lambda number: number.start, reverse=True):
        text = text[: number.start] + mark + text[number.end :]
    return text


def _shards(name: str) -> list[Number]:
    return [number for number in read_numbers(stem(name)) if number.kind is Kind.SHARD]


def shard_ids(name: str) -> _Ids:
    """Return the numbers of ranks, parts and shards in a name."""
    return tuple(number.value for number in _shards(name))


def template(name: str) -> str:
    """Return the name with `*` for the numbers of ranks, parts and shards."""
    return replaced(name, _shards(name), "*").replace(_SHARED, "-rank-*-")


def family(name: str) -> str:
    """Return the template of a name with `#` for steps, epochs and aliases.

    All checkpoints of one run have the same family.
    """
    plain = ALIAS.sub("#", template(replaced(name, counts_in_name(name), "#")))
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
    """Return the families whose numbers count ranks, parts or shards.

    They count from 0, or from 1 with few gaps.  Other numbers are sizes, as in `lora-rank8.pt` and
    `lora-rank16.pt`.
    """
    families: dict[str, set[_Ids]] = defaultdict(set)
    for name in names:
        if ids := shard_ids(name):
            families[family(name)].add(ids)
    return {
        text
        for text, rows in families.items()
        if _SHARD_COUNT.search(text)
        or all(
            0 in column or 2 * len(column) > max(column)
            for column in map(set, zip(*rows, strict=False))
        )
    }


def _companion(text: str) -> tuple[str, str] | None:
    """Return the word for a file's content (`opt` in `opt010000.pt`), and the rest of its name.

    Return None if the name has not exactly one such word, or neither a number nor an alias.
    """
    short = stem(text)
    matches = list(_COMPANION.finditer(short))
    if len(matches) != 1 or not (counts_in_name(short) or ALIAS.search(short)):
        return None
    start, end = matches[0].span()
    return matches[0][0].lower(), f"{short[:start]}*{short[end:].lstrip('-_.')}"


def is_member(name: str) -> bool:
    """Return whether a file of this name may be one of several files of a checkpoint."""
    return bool(_shards(name)) or _companion(template(name)) is not None


def is_numbered_piece(name: str) -> bool:
    """Return whether a name has a shard's number and count: `model-00001-of-00002.safetensors`."""
    match = _SHARD_COUNT.search(template(name))
    return match is not None and match[1] is not None


def missing_files(members: Iterable[str]) -> list[str]:
    """Return the names of missing shards: gaps in the numbers, or in the count in the names."""
    shards: dict[str, dict[_Ids, str]] = defaultdict(dict)
    for name in members:
        if ids := shard_ids(name):
            shards[template(name)][ids] = name
    missing: list[str] = []
    for text, members_by_ids in shards.items():
        if len({len(ids) for ids in members_by_ids}) > 1:  # all ranks share some files
            continue
        columns = [_range(column) for column in zip(*members_by_ids, strict=True)]
        count = _SHARD_COUNT.search(text)
        if count and len(columns) == 1:
            columns = [range(columns[0].start, columns[0].start + int(count[1] or count[2]))]
        example = next(iter(members_by_ids.values()))
        if 1 < math.prod(map(len, columns)) <= _MAX_SHARDS:
            absent = (ids for ids in product(*columns) if ids not in members_by_ids)
            missing += [_with_ids(example, ids) for ids in absent]
    return missing


def _range(values: Sequence[int]) -> range:
    """Return the range from 0 (or 1, if 0 is not a value) to the largest value."""
    return range(0 if 0 in values else 1, max(values) + 1)


def _with_ids(name: str, ids: _Ids) -> str:
    """Return the name with other shard numbers."""
    for number, value in reversed(list(zip(_shards(name), ids, strict=True))):
        name = f"{name[: number.start]}{value:0{number.digits}}{name[number.end :]}"
    return name
