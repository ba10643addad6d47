"""The grace period: gc keeps the data of a dropped commit for a while, so that undo can restore it.

A drop record hides commits at once.  gc deletes their data when the record is older than the
setting `gc-grace`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from ckptvcs.gc.retention import BY_NAME, REKEY
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.reachability import can_unarchive, is_whole
from ckptvcs.history.records import DIRECT, LEFT_OUT, DropRecord
from ckptvcs.store.ids import ObjectId


def waiting_drops(catalog: Catalog, now: datetime, seconds: float) -> list[ObjectId]:
    """Return the drops that no undo reverts and whose grace period of so many seconds still runs.

    A record from the future waits too: clocks can be wrong, and waiting loses nothing.  A drop
    whose data is not complete has ended: an earlier gc has deleted the data.  No undo restores what
    a bundle file left out.
    """
    if seconds <= 0:
        return []
    young = {
        name: record
        for name, record in catalog.drops().items()
        if record.rule != LEFT_OUT and _age(record, now) < seconds
    }
    gone = catalog.dropped(*young)
    return [
        name
        for name, record in young.items()
        if all(map(catalog.store.contains, record.commits))
        and is_whole(catalog, {c: catalog.commit(c) for c in record.commits}, gone)
    ]


def waiting_archives(catalog: Catalog, now: datetime, seconds: float) -> dict[ObjectId, DropRecord]:
    """Return the archive records whose grace period of so many seconds still runs.

    One whose data is not complete has ended: an earlier gc has deleted the forms before it.
    """
    return {
        name: record
        for name, record in catalog.archives().items()
        if record.rule not in (DIRECT, LEFT_OUT)
        and seconds > 0
        and _age(record, now) < seconds
        and can_unarchive(catalog, record)
    }


def first_end(drops: Iterable[DropRecord], seconds: float) -> str | None:
    """Return when the first of some drops has waited for so many seconds, as ISO 8601 in UTC.

    None if there are none, or if none has a valid time.
    """
    ends = []
    for made in filter(None, map(_time_of, drops)):
        with contextlib.suppress(OverflowError):
            ends.append(made + timedelta(seconds=seconds))
    return min(ends).isoformat(timespec="seconds") if ends else None


def waiting_commits(catalog: Catalog, now: datetime, seconds: float) -> frozenset[ObjectId]:
    """Return the dropped commits whose data stays until the grace period of so many seconds ends.

    Some may be on no ref any more.
    """
    swept = catalog.dropped(*waiting_drops(catalog, now, seconds))
    return frozenset(catalog.dropped().commits - swept.commits)


def _age(record: DropRecord, now: datetime) -> float:
    """Return the age of a record in seconds; a record without a valid time is new."""
    made = _time_of(record)
    return 0.0 if made is None else (now - made).total_seconds()


def _time_of(record: DropRecord) -> datetime | None:
    """Return when a record was made; None if it has no valid time with a time zone."""
    with contextlib.suppress(ValueError, OverflowError):
        made = datetime.fromisoformat(record.time)
        return None if made.tzinfo is None else made.astimezone(UTC)
    return None


def wants_rekey(catalog: Catalog, swept: Dropped, waiting: Container[ObjectId]) -> bool:
    """Return whether deltas may still need what gc deletes, and a record asked for a rekey.

    That is data of `swept` commits, or of archives that are not `waiting`.
    """
    if any(must_rekey(catalog, swept, rule) for rule in (BY_NAME, REKEY)):
        return True
    for name, record in catalog.archives().items():
        if name not in waiting and any(
            catalog.has_recipe(values, patches=False)
            for commit in record.commits
            if catalog.store.contains(commit)
            for values in replaced(catalog, commit)
        ):
            return True
    return False


def must_rekey(catalog: Catalog, swept: Dropped, rule: str = BY_NAME) -> bool:
    """Return whether deltas may still need `swept` commits of drops whose rule ends with `rule`.

    The data of commits that were dropped by name goes even if that takes more room.
    """
    return any(
        catalog.has_recipe(state.values)
        for record in catalog.drops().values()
        if record.rule.endswith(rule)
        for commit in swept.commits.intersection(record.commits)
        if catalog.store.contains(commit)  # it is gone if it was at the end of a branch
        for state in catalog.commit(commit).parts.values()
    )


def replaced(catalog: Catalog, commit: ObjectId) -> Iterator[ObjectId]:
    """Yield the hash tables of a commit that its archived form replaces."""
    now = catalog.commit(commit).parts
    for part, state in catalog.original(commit).parts.items():
        if state.values != now[part].values:
            yield state.values
