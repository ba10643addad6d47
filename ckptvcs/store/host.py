"""Who writes: this machine, since when it runs, and which process of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def host_name() -> str:
    """The name of this machine."""
    return socket.gethostname()


def boot_id() -> str:
    """What the kernel calls this start of the machine; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def process_space() -> str:
    """What tells one set of process ids from another: containers on one machine have their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process began, as the kernel counts it: tells a reused process id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_running(pid: int, since: str) -> bool:
    """Whether a process of this machine that began at `since` is still there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not since or since == started(pid)
