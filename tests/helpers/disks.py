"""Disks that are full: file systems of a given size, and a limit that needs no file system."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import pytest

from ckptvcs.store import disk

MiB = 1 << 20


def mounted(kind: str, room: int, folder: Path) -> Path:
    """A file system of `room` bytes."""
    target = folder / f"{kind}-{room}"
    target.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={room}", "tmpfs"]
    if kind == "ext4":
        if not shutil.which("mkfs.ext4"):
            pytest.skip("there is no mkfs.ext4")
        image = target.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(room)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        options = ["-o", "loop", str(image)]
    if subprocess.run(["mount", *options, target], capture_output=True, check=False).returncode:
        pytest.skip(f"cannot mount {kind} here")
    return target


def fill(folder: Path, room: int = 0) -> None:
    """Leave so many bytes of a file system, about."""
    with (folder / "filler").open("ab", buffering=0) as file:
        size = max(0, shutil.disk_usage(folder).free - room)
        while size:
            with contextlib.suppress(OSError):
                if file.write(b"\xaa" * size) == size and room:
                    return
            size //= 2


def used_bytes(root: Path) -> int:
    """The bytes of all files below `root`, each counted once."""
    files = {}
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            files[status.st_ino] = status.st_size if path.is_file() else 0
    return sum(files.values())


@contextlib.contextmanager
def limited(root: Path, limit: int) -> Iterator[list[int]]:
    """Refuse what makes the files below `root` larger than `limit` bytes together.

    The cache is not refused, but counts.  Yields what was used at each write.
    """
    calm, seen = disk.write, [used_bytes(root)]

    def write(file: BinaryIO, data: bytes | memoryview) -> None:
        seen.append(used_bytes(root) + len(data))
        if seen[-1] > limit:
            seen.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calm(file, data)

    def disk_usage(_: object) -> Any:
        used = used_bytes(root)
        return mock.Mock(total=limit, used=used, free=max(0, limit - used))

    with mock.patch.object(disk, "write", write), mock.patch("shutil.disk_usage", disk_usage):
        yield seen
