"""Shell completion of values: revisions, branches, tags, tensors, settings, codecs.

Names come from a repository that may be hostile, and shells evaluate what they get.  So only names
of harmless characters are offered.  Any error offers nothing, silently.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ckptvcs.repo import Repo

CODECS = ("near", "lossless", "excp", "excp-max")
_FIDELITIES = ("exact", "weights", "near")
VALUES = {
    "codec": CODECS,
    "best-fidelity": _FIDELITIES,
    "tag-fidelity": _FIDELITIES,
    "pin-fidelity": _FIDELITIES,
    "max-weight-error": ("auto", "off"),
    "max-lag": ("auto", "off"),
    "max-update-nmse": ("auto", "off"),
    "log-columns": ("auto",),
    "archive-after": ("off",),
    "archive-lag": ("auto",),
    "provenance": ("full", "no-diff", "off"),
    "provenance-argv": ("on", "off"),
}
"""The words that a setting may have; other settings are numbers and free texts."""

_SORT_KEYS = {
    "log": ("step", "time", "size"),
    "diff": ("relative", "name", "cosine", "max_abs", "changed"),
}
_NEWEST = 500  # commits whose steps are offered
_MOST = 2000  # names that a shell gets
_HARMLESS = re.compile(r"[A-Za-z0-9_./@+%][A-Za-z0-9_./:@+%,~^=-]*")
_BEST = 3  # colons of best:METRIC:min and a tensor
_BREAKS = re.compile(r"[:=]+")


@dataclass(frozen=True)
class Item:
    """A value that a shell may insert."""

    value: str
    type: str = "plain"
    help: str | None = None


class _Bash:
    """Whether bash has split the current word at `:` or `=`, so that it replaces only the end."""

    splits = False


def prepare_completion(environment: MutableMapping[str, str]) -> None:
    """If a shell asks for completions, silence errors, and join words that bash has split."""
    asked = {value for name, value in environment.items() if name.endswith("_COMPLETE")}
    if not any(value.startswith("complete_") for value in asked):
        return
    sys.stderr = io.StringIO()
    if "complete_bash" in asked:
        words = environment.get("COMP_WORDS", "").split("\n")
        current = int(environment.get("COMP_CWORD", "0") or 0)
        joined, at = join(words[: current + 1])
        _Bash.splits = at
        environment["COMP_WORDS"] = "\n".join(joined)
        environment["COMP_CWORD"] = str(len(joined) - 1)


def join(words: list[str]) -> tuple[list[str], bool]:
    """Join the words that bash has split at `:` and `=`; return them and whether the last one was.

    The last word is the incomplete one.
    """
    joined: list[str] = []
    glued = was_break = False
    for word in words:
        is_break = bool(_BREAKS.fullmatch(word))
        glued = bool(joined) and (is_break or was_break)
        if glued:
            joined[-1] += word
        else:
            joined.append(word)
        was_break = is_break
    return joined, glued


def attach(parameters: Iterable[Any]) -> None:
    """Give each option and argument the completion of its values, by its name or metavar."""
    for parameter in parameters:
        found = _completer(parameter)
        if found is not None:
            parameter.shell_complete = partial(_items, found)


def _completer(parameter: Any) -> Callable[[Any, str], Iterable[str]] | None:
    metavar = (parameter.metavar or "").strip("[]. ")
    names = [metavar]
    if parameter.param_type_name == "option":
        names = [*parameter.opts, metavar if metavar == "REV" else ""]
    return next((_COMPLETERS[name] for name in names if name in _COMPLETERS), None)


def _items(
    complete: Callable[[Any, str], Iterable[str]], context: Any, incomplete: str
) -> list[Item]:
    try:
        values = [value for value in complete(context, incomplete) if _HARMLESS.fullmatch(value)]
    except Exception:
        return []
    found = [value for value in dict.fromkeys(values) if value.startswith(incomplete)][:_MOST]
    cut = 0
    if _Bash.splits:
        cut = max(incomplete.rfind(":"), incomplete.rfind("=")) + 1
    return [Item(value[cut:]) for value in found]


def _repo(context: Any) -> Repo:
    given = context.find_root().params
    for folder in given.get("directory") or ():
        os.chdir(folder)
    return Repo(Repo.locate(given.get("repo") or os.environ.get("CKPT_DIR") or None))


def _metric_names(repo: Repo) -> list[str]:
    return [name for entry in repo.log(_NEWEST, all_branches=True) for name in entry.metrics]


def _revisions(context: Any, text: str) -> Iterable[str]:
    start, dots, last = text.rpartition("..")
    repo = _repo(context)
    if last.startswith("best:"):
        names = [f"best:{name}:{end}" for name in _metric_names(repo) for end in ("min", "max")]
    else:
        names = [row.name for row in (*repo.branches(), *repo.tags())]
        names += ["HEAD", "latest", "latest-good", "best:"]
        steps = (entry.step for entry in repo.log(_NEWEST, all_branches=True))
        names += [str(step) for step in steps if step is not None]
    return [f"{start}{dots}{name}" for name in names]


def _tensors(context: Any, text: str) -> Iterable[str]:
    if ":" not in text or (text.startswith("best:") and text.count(":") < _BEST):
        return [f"{name}:" for name in _revisions(context, text) if not name.endswith(":")]
    repo = _repo(context)
    revision = text[: text.rfind(":")]
    return [f"{revision}:{one.name}" for one in repo.tensors(revision, small=True)]


def _branches(context: Any, _: str) -> Iterable[str]:
    return [row.name for row in _repo(context).branches()]


def _names(context: Any, text: str) -> Iterable[str]:
    """Complete NAME, which has another meaning for each command."""
    command = context.command.name
    if command == "tag":
        return [row.name for row in _repo(context).tags()]
    return _branches(context, text) if command in ("branch", "reflog") else ()


def _metrics(context: Any, _: str) -> Iterable[str]:
    sign = "=" if context.command.name in ("commit", "note") else ""
    return [f"{name}{sign}" for name in _metric_names(_repo(context))]


def _rules(context: Any, _: str) -> Iterable[str]:
    names = _metric_names(_repo(context))
    return [f"{name}:{end}" for name in names for end in ("min", "max")]


def _sort_keys(context: Any, _: str) -> Iterable[str]:
    command = context.command.name
    metrics = _metric_names(_repo(context)) if command == "log" else []
    return [*_SORT_KEYS.get(command, ()), *metrics]


def _settings(context: Any, _: str) -> Iterable[str]:
    return _repo(context).settings()


def _values(context: Any, _: str) -> Iterable[str]:
    return VALUES.get(context.params.get("key"), ())


_COMPLETERS: dict[str, Callable[[Any, str], Iterable[str]]] = {
    "REV": _revisions,
    "REV..REV": _revisions,
    "A": _revisions,
    "B": _revisions,
    "GOOD": _revisions,
    "BAD": _revisions,
    "A..B": _revisions,
    "REV:TENSOR": _tensors,
    "TENSOR": lambda context, _text: [one.name for one in _repo(context).tensors(small=True)],
    "--branch": _branches,
    "BRANCH": _branches,
    "NAME": _names,
    "--codec": lambda _context, _text: CODECS,
    "--format": lambda _context, _text: ("pt", "safetensors"),
    "--metric": _metrics,
    "--unset-metric": lambda context, _text: _metric_names(_repo(context)),
    "--keep-best": _rules,
    "--sort": _sort_keys,
    "KEY": _settings,
    "VALUE": _values,
    "COMMAND": lambda context, _text: context.find_root().command.list_commands(context),
}
