"""Report wrong arguments in the style of all other errors, with a hint on what to type."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from ckptvcs.errors import InvalidInputError

_VALUES = (
    (r"(.*) is not in the range x>=(.*)\.", r"must be at least \2, got \1"),
    (r"'(.*)' is not a valid int.*\.", r"must be a whole number, got '\1'"),
    (r"'(.*)' is not a valid float.*\.", r"must be a number, got '\1'"),
    (r"'(.*)' is not one of (.*)\.", r"must be one of \2, got '\1'"),
)
_GLOBAL = ("-C", "--repo")  # the global options with a value
_SENTENCES = (
    (r"Option '(.*)' requires an argument\.", r"option \1 requires a value"),
    (r"Option '(.*)' does not take a value\.", r"option \1 takes no value"),
    (r"Got unexpected extra arguments? ?(?:\(s\) ?)?\((.*)\)", r"unexpected argument: \1"),
    (r"No such command '(.*)'\..*", r"unknown command '\1'"),
    (r"No such option: (\S+).*", r"unknown option '\1'"),
)


def explain(error: Any, arguments: Sequence[str], commands: Collection[str]) -> InvalidInputError:
    """Return an error of typer in the words of this program.

    Args:
        error: The error.
        arguments: The arguments of the command line.
        commands: The names of all commands.
    """
    given = [word for word in _without_values(arguments) if word in commands][:1]
    hint = f"run '{' '.join(['ckpt', *given, '--help'])}'"
    near = _near(error, commands)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    return InvalidInputError(_message(error), hint=hint)


def _without_values(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the values of the global options."""
    pairs = zip(("", *arguments), arguments, strict=False)
    return [word for before, word in pairs if before not in _GLOBAL]


def _near(error: Any, commands: Collection[str]) -> list[str]:
    unknown = re.match(r"No such command '(.*)'", error.message)
    if unknown:
        return [f"'{name}'" for name in get_close_matches(unknown[1], commands)]
    return sorted(name for name in getattr(error, "possibilities", None) or () if name != "--help")


def _message(error: Any) -> str:
    name = _name(getattr(error, "param", None))
    if type(error).__name__ == "MissingParameter":
        return f"missing {error.param_type or error.param.param_type_name} {name}"
    if name:
        return f"{name} {_changed(error.message, _VALUES)}"
    return _changed(error.message, _SENTENCES)


def _name(parameter: Any) -> str:
    """Return an argument as the usage shows it, or an option with all its names."""
    if parameter is None:
        return ""
    if parameter.param_type_name == "option":
        return "/".join(parameter.opts)
    return str(parameter.metavar or parameter.name).strip("[].")


def _changed(message: str, rules: Sequence[tuple[str, str]]) -> str:
    """Return a message of typer in other words; one that no rule knows only loses its capital."""
    for pattern, words in rules:
        found = re.fullmatch(pattern, message, re.DOTALL)
        if found:
            return found.expand(words)
    return f"{message[:1].lower()}{message[1:].rstrip('.')}"
