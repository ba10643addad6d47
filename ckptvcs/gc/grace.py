"""The grace period: gc keeps the data of a dropped commit for a while, so that undo can restore it.

A drop record hides commits at once.  gc deletes their data when the record is older than the
setting `gc-grace`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from ckptvcs.gc.retention import BY_NAME, REKEY
from ckptvcs.history.catalog import Catalog, Dropped
from ckptvcs.history.reachability import is_whole
from ckptvcs.history.recipe import LEFT_OUT, DropRecord
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


def wants_rekey(catalog: Catalog, swept: Dropped) -> bool:
    """Return whether deltas may still need `swept` commits whose drop asked for a rekey."""
    return any(
        catalog.has_recipe(state.values)
        for record in catalog.drops().values()
        if record.rule == BY_NAME or record.rule.endswith(REKEY)
        for commit in swept.commits.intersection(record.commits)
        if catalog.store.contains(commit)  # it is gone if it was at the end of a branch
        for state in catalog.commit(commit).parts.values()
    )
