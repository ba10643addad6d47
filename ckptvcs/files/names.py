"""Check the paths in a commit, which may come from somebody else.

A dangerous name is recognized in every spelling that some file system or tool accepts: in any case,
with invisible characters, with trailing dots and spaces, as an NTFS stream, or as a short DOS name.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from ckptvcs.errors import ConflictError, CorruptionError
from ckptvcs.text import UNSEEN

MAX_NESTING = 200
"""Limit for nested directories: Python creates them recursively."""

_MAX_PATH = 4096
_LISTED = 5  # names, in a message

_REPOSITORY = ".ckpt"
# Programs execute or trust these files without being asked.
_TRUSTED_BY = {
    "version control": ".git .gitmodules .gitconfig .hg .hgrc .svn .bzr .jj .fossil-settings _darcs"
    " .pijul .github .gitlab-ci.yml .husky .pre-commit-config.yaml",
    "directory tools": ".envrc .env .autoenv .autoenv.zsh .mise.toml mise.toml .mise"
    " .tool-versions .rtx.toml .direnv",
    "editors": ".vscode .idea .fleet .zed .devcontainer .claude .cursor .mcp.json .vimrc .gvimrc"
    " .exrc .nvimrc .nvim.lua .lvimrc .local.vimrc .dir-locals.el .dir-locals-2.el .emacs .emacs.d",
    "debuggers": ".gdbinit .lldbinit .pdbrc .pdbrc.py",
    "interpreters": ".pythonrc .pythonrc.py .pythonstartup .ipython .jupyter pyvenv.cfg .rprofile"
    " .renviron .rdata .octaverc startup.m .irbrc .pryrc .perldb .ghci",
    "build tools": ".cargo .bazelrc .mvn .gradle .npmrc .yarnrc .yarnrc.yml .pnp.cjs"
    " .pnp.loader.mjs .yarn .condarc",
    "shells": ".bashrc .bash_profile .bash_login .bash_logout .bash_aliases .profile .zshrc .zshenv"
    " .zprofile .zlogin .zlogout .kshrc .cshrc .tcshrc .login .logout .inputrc",
    "sessions": ".xprofile .xinitrc .xsession .xsessionrc .screenrc .tmux.conf .pam_environment"
    " desktop.ini autorun.inf",
    "programs that keep secrets": ".forward .rhosts .shosts .ssh .netrc .gnupg .config .local .aws"
    " .kube .docker .curlrc .wgetrc",
}
_TRUSTED = frozenset(name for names in _TRUSTED_BY.values() for name in names.split())
# Python imports these at start, and pytest when it collects tests, with any suffix.
_IMPORTED = frozenset({"sitecustomize", "usercustomize", "conftest"})
_SHORT = {re.sub("[. ]", "", name)[:6]: name for name in (_REPOSITORY, *sorted(_TRUSTED))}
_SHORT |= {name[:6]: name for name in _IMPORTED}
_ODD = re.compile(r"[~:/\\]|[. ]$")
_TILDE = re.compile(r"([^~]{1,6})~[0-9]+(?:\..*)?")


def _readings(name: str) -> set[str]:
    """Return the names that file systems and tools may take a name for, in lower case."""
    if name.isascii() and not _ODD.search(name):
        return _with_stem(name.lower())
    readings = set()
    for piece in re.split(r"[/\\]", name):
        visible = "".join(c for c in UNSEEN.sub("", piece) if unicodedata.category(c) != "Cf")
        folded = unicodedata.normalize("NFKC", visible).casefold()
        whole = folded.partition(":")[0].rstrip(". ")
        readings |= _with_stem(whole)
        short = _TILDE.fullmatch(whole)
        if short:
            readings.add(_SHORT.get(short[1], ""))
    return readings


def _with_stem(name: str) -> set[str]:
    stem = name.partition(".")[0]
    return {name, stem} if stem in _IMPORTED else {name}


def is_repository_name(name: str) -> bool:
    """Return whether some file system may take a name for `.ckpt`."""
    return _REPOSITORY in _readings(name)


def is_trusted_name(name: str) -> bool:
    """Return whether a tool executes or trusts files of this name."""
    return not _readings(name).isdisjoint(_TRUSTED | _IMPORTED)


def is_name(text: str) -> bool:
    """Return whether a file can have this name at all."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def safe_path(path: str) -> PurePosixPath:
    """Return a committed path that stays inside its target.

    Raises:
        CorruptionError: the path is absolute, contains "..", or leads into a repository.  This
            program never makes such a commit.
    """
    pure = PurePosixPath(path)
    plain = pure.parts and not pure.is_absolute() and ".." not in pure.parts and path == str(pure)
    if not plain or len(path) > _MAX_PATH or len(pure.parts) > MAX_NESTING + 1 or not is_name(path):
        raise CorruptionError(f"a commit contains an unsafe path: {path[:200]!r}")
    if any(map(is_repository_name, pure.parts)):
        raise CorruptionError(f"a commit contains a path in a repository: {path[:200]!r}")
    return pure


def trusted_names(paths: Iterable[str]) -> list[str]:
    """Return the paths that contain a name that tools execute or trust, cut after that name."""
    names: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        for at, part in enumerate(parts, 1):
            if is_trusted_name(part):
                names["/".join(parts[:at])] = None
                break
    return list(names)


def listed(names: list[str]) -> str:
    """Return the first few names for a message, with unprintable characters escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_LISTED]]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more


def refuse_trusted(paths: Iterable[str]) -> None:
    """Raise ConflictError if tools execute or trust one of the paths because of its name."""
    names = trusted_names(paths)
    if names:
        raise ConflictError(
            f"tools execute or trust files of this name: {listed(names)}",
            hint="check the origin of the commit; --force writes them",
        )
