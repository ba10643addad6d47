"""Identify this machine, its current boot, and its processes."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
from pathlib import Path

from ckptvcs.hashing import hex_hash

NETWORK = Path("/sys/class/net")
ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))


def host_name() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def boot_id() -> str:
    """Return the kernel's id of this boot, or "" if it is not known."""
    return _text(Path("/proc/sys/kernel/random/boot_id"))


@lru_cache(1)
def machine_id() -> str:
    """Return an id that survives a reboot and that no other machine has, or "" if unsure.

    The id of the installed system is not enough: copied machines share it, and so do containers of
    one image.  The addresses of network cards distinguish copies.  A container sees no cards, and
    so has no such id.
    """
    cards = sorted(filter(None, map(_address, _listed(NETWORK))))
    installed = next(filter(None, map(_text, ID_FILES)), "")
    if not cards or len(installed) != 32:
        return ""
    return hex_hash(f"ckptvcs {installed} {' '.join(cards)}".encode())[:32]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    """Return the text of a small file, or "" if it cannot be read, or would block (TypeError)."""
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError, TypeError):
        return ""


def _address(card: Path) -> str:
    """Return the address of a physical network card; virtual interfaces have no device."""
    return _text(card / "address") if (card / "device").exists() else ""


def seconds_since_start() -> float:
    """Return the time since boot, including sleep, or 0 if it is not known."""
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return 0.0


def process_space() -> str:
    """Return the id of the process id namespace, which each container has for itself."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def started(pid: int) -> str:
    """Return the start time of a process in kernel ticks; it reveals a reused process id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_running(pid: int, since: str) -> bool:
    """Return whether the process that started at `since` (see `started`) is still running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not since or since == started(pid)
