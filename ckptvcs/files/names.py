"""Names: which paths a commit may have, and which of them only a user may ask for.

A commit may come from somebody else.  A name is read as the most lenient file system and tool would
read it: in any case, with marks that are not seen, with dots and spaces behind it, as a stream of
NTFS, or as a short name of DOS.
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
"""Directories in each other; Python makes those of a path in as many calls."""

_MAX_PATH = 4096
_LISTED = 5  # names, in a message

_REPOSITORY = ".ckpt"
# Programs run what stands in these, or believe it, without being told to: tools of versions, of
# working folders, editors, debuggers and interpreters, builds, shells, programs that have secrets.
_TRUSTED = frozenset(
    {
        ".git",
        ".gitmodules",
        ".gitconfig",
        ".hg",
        ".hgrc",
        ".svn",
        ".bzr",
        ".jj",
        ".fossil-settings",
        "_darcs",
        ".pijul",
        ".github",
        ".gitlab-ci.yml",
        ".husky",
        ".pre-commit-config.yaml",
        ".envrc",
        ".env",
        ".autoenv",
        ".autoenv.zsh",
        ".mise.toml",
        "mise.toml",
        ".mise",
        ".tool-versions",
        ".rtx.toml",
        ".direnv",
        ".vscode",
        ".idea",
        ".fleet",
        ".zed",
        ".devcontainer",
        ".claude",
        ".cursor",
        ".mcp.json",
        ".vimrc",
        ".gvimrc",
        ".exrc",
        ".nvimrc",
        ".nvim.lua",
        ".lvimrc",
        ".local.vimrc",
        ".dir-locals.el",
        ".dir-locals-2.el",
        ".emacs",
        ".emacs.d",
        ".gdbinit",
        ".lldbinit",
        ".pdbrc",
        ".pdbrc.py",
        ".pythonrc",
        ".pythonrc.py",
        ".pythonstartup",
        ".ipython",
        ".jupyter",
        "pyvenv.cfg",
        ".rprofile",
        ".renviron",
        ".rdata",
        ".octaverc",
        "startup.m",
        ".irbrc",
        ".pryrc",
        ".perldb",
        ".ghci",
        ".cargo",
        ".bazelrc",
        ".mvn",
        ".gradle",
        ".npmrc",
        ".yarnrc",
        ".yarnrc.yml",
        ".pnp.cjs",
        ".pnp.loader.mjs",
        ".yarn",
        ".bashrc",
        ".bash_profile",
        ".bash_login",
        ".bash_logout",
        ".bash_aliases",
        ".profile",
        ".zshrc",
        ".zshenv",
        ".zprofile",
        ".zlogin",
        ".zlogout",
        ".kshrc",
        ".cshrc",
        ".tcshrc",
        ".login",
        ".logout",
        ".xprofile",
        ".xinitrc",
        ".xsession",
        ".xsessionrc",
        ".inputrc",
        ".screenrc",
        ".tmux.conf",
        ".pam_environment",
        ".forward",
        ".rhosts",
        ".shosts",
        ".ssh",
        ".netrc",
        ".gnupg",
        ".config",
        ".local",
        ".aws",
        ".kube",
        ".docker",
        ".condarc",
        ".curlrc",
        ".wgetrc",
        "desktop.ini",
        "autorun.inf",
    }
)
# Python imports these when it starts, pytest when it looks for tests: whatever their suffix.
_IMPORTED = frozenset({"sitecustomize", "usercustomize", "conftest"})
_SHORT = {re.sub("[. ]", "", name)[:6]: name for name in (_REPOSITORY, *sorted(_TRUSTED))}
_SHORT |= {name[:6]: name for name in _IMPORTED}
_ODD = re.compile(r"[~:/\\]|[. ]$")
_TILDE = re.compile(r"([^~]{1,6})~[0-9]+(?:\..*)?")


def _readings(name: str) -> set[str]:
    """What a name may be taken for, in lower case."""
    if name.isascii() and not _ODD.search(name):
        return _with_stem(name.lower())
    found = set()
    for piece in re.split(r"[/\\]", name):
        seen = "".join(c for c in UNSEEN.sub("", piece) if unicodedata.category(c) != "Cf")
        folded = unicodedata.normalize("NFKC", seen).casefold()
        whole = folded.partition(":")[0].rstrip(". ")
        found |= _with_stem(whole)
        short = _TILDE.fullmatch(whole)
        if short:
            found.add(_SHORT.get(short[1], ""))
    return found


def _with_stem(name: str) -> set[str]:
    stem = name.partition(".")[0]
    return {name, stem} if stem in _IMPORTED else {name}


def is_repository_name(name: str) -> bool:
    """Whether some file system takes the name of an entry for that of a repository."""
    return _REPOSITORY in _readings(name)


def is_trusted_name(name: str) -> bool:
    """Whether a tool executes or believes an entry by its name alone."""
    return not _readings(name).isdisjoint(_TRUSTED | _IMPORTED)


def is_name(text: str) -> bool:
    """Whether the file system can have a name like this at all."""
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def safe_path(path: str) -> PurePosixPath:
    """A committed path that stays inside its target.

    Raises:
        CorruptionError: it is absolute, or climbs, or leads into a repository.  Such a commit was
            not made by this program from such a file.
    """
    pure = PurePosixPath(path)
    plain = pure.parts and not pure.is_absolute() and ".." not in pure.parts and path == str(pure)
    if not plain or len(path) > _MAX_PATH or len(pure.parts) > MAX_NESTING + 1 or not is_name(path):
        raise CorruptionError(f"a commit holds a file that would leave its target: {path[:200]!r}")
    if any(map(is_repository_name, pure.parts)):
        raise CorruptionError(f"a commit holds a file of a repository: {path[:200]!r}")
    return pure


def trusted_names(paths: Iterable[str]) -> list[str]:
    """Those of some paths, cut at the first name that a tool executes or believes."""
    found: dict[str, None] = {}
    for path in paths:
        parts = path.split("/")
        for at, part in enumerate(parts, 1):
            if is_trusted_name(part):
                found["/".join(parts[:at])] = None
                break
    return list(found)


def listed(names: list[str]) -> str:
    """The first few of some names, so that whatever is in them is seen."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_LISTED]]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown) + more


def refuse_trusted(paths: Iterable[str]) -> None:
    """Raises ConflictError where a tool executes or believes one of some paths by its name."""
    names = trusted_names(paths)
    if names:
        raise ConflictError(
            f"tools execute or trust files of this name: {listed(names)}",
            hint="look where the commit comes from; --force writes them",
        )
