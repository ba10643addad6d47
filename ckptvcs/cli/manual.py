"""The manual page: all commands with their usage, options and examples, in the format of man."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptvcs.cli.examples import EXAMPLES


def page(context: Any, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of the page; `context` is that of the root of the command line."""
    root = context.command
    lines = ['.TH CKPT 1 "" ckptvcs', ".SH NAME", f"ckpt \\- {_text(_summary(root))}"]
    lines += [".SH SYNOPSIS", ".B ckpt", _text("[OPTIONS] COMMAND [ARGS]..."), ".SH OPTIONS"]
    lines += _parameters(root, context)
    for title, names in groups.items():
        lines.append(f'.SH "{title.upper()}"')
        for name in names:
            lines += _command(root.get_command(context, name), name, context)
    lines += [".SH SEE ALSO", "https://github.com/ckptvcs/ckptvcs/tree/main/docs"]
    return lines


def _summary(command: Any) -> str:
    return " ".join(inspect.cleandoc(command.help).replace("\b", "").split())


def _command(command: Any, name: str, root: Any) -> Iterator[str]:
    context = type(root)(command, info_name=name, parent=root)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from (f".SS {name}", f"\\fB{_text(f'ckpt {name} {usage}')}\\fR", ".PP")
    yield _text(_summary(command))
    yield from _parameters(command, context)
    yield from (".PP", "Examples:", ".nf", *map(_text, EXAMPLES[name]), ".fi")


def _parameters(command: Any, context: Any) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and parameter.name != "help":
            yield from (".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1] or ""))


def _text(text: str) -> str:
    """Return a text on a line as roff shows it."""
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return f"\\&{escaped}" if escaped.startswith((".", "\\(aq")) else escaped
