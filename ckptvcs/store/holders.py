"""Holders: whether the process that wrote a lease may still be at work.

Only what proves that it is gone counts: that this very machine was started anew, that the process
has ended, that nobody has the lock that its holder took, that the file is a copy.  All of this can
be seen on the holder's own machine alone.  Elsewhere a holder is known by the renewals of its
lease: one that was seen for an hour and not renewed counts no more.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

from ckptvcs.errors import CkptError
from ckptvcs.store.backend import Backend, Trace, read_small
from ckptvcs.store.host import (
    boot_id,
    is_running,
    machine_id,
    process_space,
    seconds_since_start,
    started,
)

BEAT = 20.0
"""Seconds between two renewals of a lease."""

SILENCE = 3600.0
"""Seconds that a lease is seen and not renewed, until its holder counts no more."""

_MOST_AT_ONCE = SILENCE / 2  # between two looks: the file system may have been away as long
_NOTES = "cache/silent"
_MAX_NOTES = 1 << 16
_NANO = 1e9


class Holder(Enum):
    """What is known of a holder."""

    THERE = "there"
    GONE = "gone"
    UNKNOWN = "unknown"
    SILENT = "silent"


NO_MORE = frozenset({Holder.GONE, Holder.SILENT})
"""What makes a lease count no more for a sweep."""


def describe(trace: Trace, host: str, boot: str, *, is_renewed: bool) -> bytes:
    """The content of a lease of this process, in a file that has this trace."""
    pid = os.getpid()
    return json.dumps(
        {
            "host": host,
            "boot": boot,
            "space": process_space(),
            "pid": pid,
            "started": started(pid),
            "machine": machine_id(),
            "device": trace.device,
            "inode": trace.inode,
            "fixed": trace.fixed,
            "locked": trace.is_locked is True,
            "renewed": is_renewed,
        }
    ).encode()


def judge(
    data: bytes, trace: Trace, host: str, boot: str, *, is_meant: bool, clock_ns: Callable[[], int]
) -> Holder:
    """What is known of the process that wrote a lease; `host` and `boot` are those of this machine.
    Where it is this process, the lease `is_meant` unless it has been withdrawn.
    """
    try:
        fields = json.loads(data)
        own, since, pid = fields["host"], str(fields["started"]), int(fields["pid"])
        unseen = Holder.UNKNOWN if fields.get("renewed") is True else Holder.THERE
        is_this_start = fields["boot"] == boot and (boot != "" or own == host)
        if "machine" not in fields and own != host:
            return unseen
        if not is_this_start:
            return _of_other_start(fields, trace, host, clock_ns, unseen)
        if _is_released(fields, trace):
            return Holder.GONE
        if fields.get("space", "") != process_space():
            seen = fields.get("locked") is True and trace.is_locked is True
            return Holder.THERE if seen else unseen
        if pid == os.getpid():
            return Holder.THERE if is_meant else Holder.GONE
        return Holder.THERE if is_running(pid, since) else Holder.GONE
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return Holder.GONE


def _of_other_start(
    fields: dict[str, Any], trace: Trace, host: str, clock_ns: Callable[[], int], unseen: Holder
) -> Holder:
    """Of a lease that another machine wrote, or this one before it was started anew."""
    if trace.is_locked:
        return Holder.THERE
    if "machine" in fields:
        is_this_machine = fields["machine"] == machine_id() != "" and fields["host"] == host
    else:  # an older program knew machines by their names alone
        is_this_machine = True
    if is_this_machine and trace.fixed:  # no other machine can write here
        return Holder.GONE
    age, running = (clock_ns() - trace.renewed_ns) / _NANO, seconds_since_start()
    if is_this_machine and running > 2 * BEAT and age > running:
        return Holder.GONE  # another machine of the same name would have renewed it since
    return unseen


def _is_released(fields: dict[str, Any], trace: Trace) -> bool:
    """Whether a lease that was written since this machine was started is a copy, or has lost the
    lock that its holder took.
    """
    if "machine" not in fields:
        return False
    if fields["device"] != trace.device:  # of one file there are two only by way of a network
        return fields["fixed"] is True and trace.fixed
    is_copy = trace.fixed and fields["inode"] != trace.inode
    return is_copy or (fields["locked"] is True and trace.is_locked is False)


class Silence:
    """What was seen of leases whose holders nobody can see from here.  Time counts only between
    looks of processes of one start of this machine, and by its own clock that nobody sets.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float, float]] = {}  # when renewed, last look, silent for

    def judge(self, backend: Backend, name: str, trace: Trace) -> Holder:
        """Look once more at the lease of a holder that is not known."""
        now = time.monotonic()
        before = self._seen.get(name) or self._noted(backend).get(name)
        silent = 0.0
        if before is not None and before[0] == trace.renewed_ns and before[1] <= now:
            silent = before[2] + min(now - before[1], _MOST_AT_ONCE)
        self._seen[name] = trace.renewed_ns, now, silent
        return Holder.SILENT if silent >= SILENCE else Holder.UNKNOWN

    def keep(self, backend: Backend) -> None:
        """Note what was seen, for processes that come later; if it can be noted."""
        there = {*backend.names("leases"), *backend.names("marks")}
        seen = {name: row for name, row in self._seen.items() if name in there}
        if seen:
            backend.cache(_NOTES, json.dumps({"boot": boot_id(), "seen": seen}).encode())

    @staticmethod
    def _noted(backend: Backend) -> dict[str, tuple[int, float, float]]:
        found: dict[str, tuple[int, float, float]] = {}
        with suppress(
            CkptError,
            FileNotFoundError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):
            fields = json.loads(read_small(backend, _NOTES, _MAX_NOTES))
            if fields["boot"] == boot_id() != "":
                for name, (renewed, last, silent) in fields["seen"].items():
                    if math.isfinite(last) and 0 <= silent <= SILENCE:
                        found[name] = int(renewed), float(last), float(silent)
        return found
