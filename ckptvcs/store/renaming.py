"""Renames in one step of the kernel that replace nothing, or that exchange two names."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

FREE_ONLY, EXCHANGE = "free only", "exchange"
CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""The errors of a kernel or a file system that does not support a request."""

AT_WORKING_FOLDER = -2 if sys.platform == "darwin" else -100
_FLAGS = {
    "linux": ("renameat2", {FREE_ONLY: 1, EXCHANGE: 2}),
    "darwin": ("renameatx_np", {FREE_ONLY: 4, EXCHANGE: 2}),
}


def rename(folder: int, old: str, new: str, how: str) -> bool:
    """Rename to a free name or exchange two names, in one step; return whether that is possible.

    Raises:
        FileExistsError: the name is not free.
        OSError: the file system refuses.
    """
    function, flags = _FLAGS.get(sys.platform, ("", {}))
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), function)
    except (OSError, AttributeError):
        return False
    if call(folder, os.fsencode(old), folder, os.fsencode(new), ctypes.c_uint(flags[how])) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), new)
