"""Decide whether the holder of a lease is gone, or may still be at work.

A holder is gone only if that is proven: its machine was rebooted, its process has ended, nobody
holds the lock that it took, or the file is a copy.  Only the machine of the holder can see this.
Other machines watch the renewals of the lease, and ignore it after an hour without one.
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
"""Seconds of watching a lease without a renewal, after which its holder is ignored."""

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""The exceptions of reading JSON that has another form than this program writes."""

_MAX_GAP = SILENCE / 2  # counted between two looks: the file system may have been unreachable
_NOTES = "cache/silent"
_MAX_NOTES = 1 << 16  # bytes
_NANO = 1e9


class Holder(Enum):
    """The state of a holder."""

    LIVE = "live"
    GONE = "gone"
    UNKNOWN = "unknown"
    SILENT = "silent"


DEAD = frozenset({Holder.GONE, Holder.SILENT})
"""The states in which gc ignores a lease."""


def describe(trace: Trace, host: str, boot: str, *, is_renewed: bool) -> bytes:
    """Return the content of a lease of this process, for a file with this trace."""
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
    data: bytes, trace: Trace, host: str, boot: str, *, is_held: bool, clock_ns: Callable[[], int]
) -> Holder:
    """Return the state of the holder of a lease, given `host` and `boot` of this machine.

    `is_held` says whether this process holds the lease; it is used only if this process wrote it.
    """
    try:
        fields = json.loads(data)
        lease_host, since, pid = fields["host"], str(fields["started"]), int(fields["pid"])
        undecided = Holder.UNKNOWN if fields.get("renewed") is True else Holder.LIVE
        is_this_boot = fields["boot"] == boot and (boot != "" or lease_host == host)
        if "machine" not in fields and lease_host != host:
            return undecided
        if not is_this_boot:
            return _of_other_boot(fields, trace, host, clock_ns, undecided)
        if _is_released(fields, trace):
            return Holder.GONE
        if fields.get("space", "") != process_space():
            is_locked = fields.get("locked") is True and trace.is_locked is True
            return Holder.LIVE if is_locked else undecided
        if pid == os.getpid():
            return Holder.LIVE if is_held else Holder.GONE
        return Holder.LIVE if is_running(pid, since) else Holder.GONE
    except MALFORMED:
        return Holder.GONE


def _of_other_boot(
    fields: dict[str, Any], trace: Trace, host: str, clock_ns: Callable[[], int], undecided: Holder
) -> Holder:
    """Judge a lease that another machine wrote, or an earlier boot of this one."""
    if trace.is_locked:
        return Holder.LIVE
    if "machine" in fields:
        is_this_machine = fields["machine"] == machine_id() != "" and fields["host"] == host
    else:  # an older program identified machines by name; `judge` has compared the names
        is_this_machine = True
    if is_this_machine and trace.fixed:  # no other machine can write here
        return Holder.GONE
    age, running = (clock_ns() - trace.renewed_ns) / _NANO, seconds_since_start()
    if is_this_machine and running > 2 * BEAT and age > running:
        return Holder.GONE  # another machine of the same name would have renewed it since
    return undecided


def _is_released(fields: dict[str, Any], trace: Trace) -> bool:
    """Return whether a lease of this boot is a copy, or its holder no longer holds the lock."""
    if "machine" not in fields:
        return False
    if fields["device"] != trace.device:  # a network file system may have several numbers
        return fields["fixed"] is True and trace.fixed
    is_copy = trace.fixed and fields["inode"] != trace.inode
    return is_copy or (fields["locked"] is True and trace.is_locked is False)


class Silence:
    """Observations of leases that renewals alone can tell to be live.

    Time is counted only between looks during one boot of this machine, by its monotonic clock,
    which nobody can set.
    """

    def __init__(self) -> None:
        # name -> (renewal time, time of the last look, seconds without a renewal)
        self._seen: dict[str, tuple[int, float, float]] = {}

    def judge(self, backend: Backend, name: str, trace: Trace) -> Holder:
        """Look once more at a lease whose holder is UNKNOWN."""
        now = time.monotonic()
        before = self._seen.get(name) or self._noted(backend).get(name)
        silent = 0.0
        if before is not None and before[0] == trace.renewed_ns and before[1] <= now:
            silent = before[2] + min(now - before[1], _MAX_GAP)
        self._seen[name] = trace.renewed_ns, now, silent
        return Holder.SILENT if silent >= SILENCE else Holder.UNKNOWN

    def keep(self, backend: Backend) -> None:
        """Write the observations to the cache, for later processes."""
        present = {*backend.names("leases"), *backend.names("marks")}
        seen = {name: row for name, row in self._seen.items() if name in present}
        if seen:
            backend.cache(_NOTES, json.dumps({"boot": boot_id(), "seen": seen}).encode())

    @staticmethod
    def _noted(backend: Backend) -> dict[str, tuple[int, float, float]]:
        notes: dict[str, tuple[int, float, float]] = {}
        with suppress(CkptError, FileNotFoundError, *MALFORMED):
            fields = json.loads(read_small(backend, _NOTES, _MAX_NOTES))
            if fields["boot"] == boot_id() != "":
                for name, (renewed, last, silent) in fields["seen"].items():
                    if math.isfinite(last) and 0 <= silent <= SILENCE:
                        notes[name] = int(renewed), float(last), float(silent)
        return notes
