"""Who writes: this machine, this start of it, and which process of it."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
from pathlib import Path

from ckptvcs.hashing import hex_hash

_NETWORK = Path("/sys/class/net")
_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def host_name() -> str:
    """The name of this machine."""
    return socket.gethostname()


def boot_id() -> str:
    """What the kernel calls this start of the machine; empty where it does not say."""
    return _text(Path("/proc/sys/kernel/random/boot_id"))


@lru_cache(1)
def machine_id() -> str:
    """What this machine is called from one start to the next, and no other machine is; empty where
    nothing says so for sure.

    The id that its system was installed with is no proof alone: machines that were copied share
    it, and so do containers of one image.  The addresses of network cards tell copies apart; a
    container sees none, and so has no such name.
    """
    cards = sorted(filter(None, map(_address, _listed(_NETWORK))))
    installed = next(filter(None, map(_text, _ID_FILES)), "")
    if not cards or len(installed) != 32:
        return ""
    return hex_hash(f"ckptvcs {installed} {' '.join(cards)}".encode())[:32]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    """The text of a small file; empty where there is none, or a read would block (TypeError)."""
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError, TypeError):
        return ""


def _address(card: Path) -> str:
    """The address of a network card that is one: what is made by software has no device."""
    return _text(card / "address") if (card / "device").exists() else ""


def seconds_since_start() -> float:
    """How long this machine has been running, asleep or not; 0 where it does not say."""
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return 0.0


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
