"""Where a commit comes from: who made it, and with which training code."""

from __future__ import annotations

import contextlib
import getpass
import subprocess
from pathlib import Path


def user() -> str:
    """The name of the user, empty where nobody knows it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return ""


def code_commit() -> str | None:
    """The git commit of the code in the working directory, if there is one."""
    folder = Path.cwd()
    if not any((above / ".git").exists() for above in (folder, *folder.parents)):
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "--quiet", "HEAD"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
        return done.stdout.strip() or None
    return None
