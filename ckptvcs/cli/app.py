"""The root of the command line: global options, commands, errors to exit codes."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from ckptvcs.cli import render
from ckptvcs.cli.completion import attach, prepare_completion
from ckptvcs.cli.context import Globals
from ckptvcs.cli.examples import EXAMPLES
from ckptvcs.cli.failures import bug, end, wants_json
from ckptvcs.cli.streams import OutputError, prepare
from ckptvcs.errors import InvalidInputError
from ckptvcs.parallel import spare_threads

P = ParamSpec("P")

GROUPS = {
    "Store checkpoints": ("init", "commit", "import", "watch"),
    "Look at a run": ("log", "show", "status", "diff", "bisect", "each", "reflog"),
    "Look at tensors": ("ls", "cat", "series"),
    "Get checkpoints back": ("checkout", "export", "average"),
    "Share commits": ("bundle", "clone", "fetch"),
    "Name and describe commits": ("branch", "tag", "pin", "unpin", "note"),
    "Maintain a repository": ("gc", "drop", "undo", "verify", "stats", "du", "config", "index"),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)
_MODULES = {"import": "importing", "unpin": "pin"}  # the others have the names of their commands
_WITH_NUMPY = {"commit", "import", "watch", "diff", "bisect", "cat", "gc", "drop", "verify"}.union(
    GROUPS["Get checkpoints back"], GROUPS["Share commits"], ("each", "series")
)
_NEGATIVE = re.compile(r"-[.]?[0-9]")
_SUMMARY = 80  # characters; longer than every summary
_NO_COMMAND = 2  # exit code
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def load(command: str) -> Callable[..., None]:
    """Import the module of a command, and return its function."""
    if command in _ABOUT:
        return _ABOUT[command]
    module = import_module(f"ckptvcs.cli.{_MODULES.get(command, command)}")
    # `import` is a keyword of Python.
    function: Callable[..., None] = getattr(module, "import_" if command == "import" else command)
    return function


def _quieten(_context: Any, _option: Any, on: bool) -> None:
    if on:
        render.be_quiet(True)


class Command(TyperCommand):
    """A command whose usage shows required arguments without braces, as in git.

    It takes -q too, and negative numbers as arguments.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def get_params(self, ctx: Any) -> list[Any]:
        quiet = TyperOption(
            param_decls=["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            hidden=True,
            callback=_quieten,
        )
        found: list[Any] = super().get_params(ctx)
        attach(found)
        return [*found, quiet]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        lines = EXAMPLES.get(self.name or "", ())
        if lines:
            with formatter.section("Examples"):
                for line in lines:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # The parser would take -1 for an option.  Unknown options then count as arguments.
        ctx.ignore_unknown_options = any(map(_NEGATIVE.match, args))
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """The commands; their modules are imported on demand."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)
        for option in found:
            if option.name in ("install_completion", "show_completion"):
                option.help = f"{option.name.partition('_')[0]} completion for the current shell"
        return found

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *_ABOUT]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in (*GROUPS.items(), ("Help", tuple(_ABOUT))):
            commands = {name: self.get_command(ctx, name) for name in names}
            rows = [(name, row.get_short_help_str(_SUMMARY)) for name, row in commands.items()]
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in (*COMMANDS, *_ABOUT):
            return None
        app = typer.Typer(
            add_completion=False,
            rich_markup_mode=None,
            context_settings=_SETTINGS,
            pretty_exceptions_enable=False,
        )
        app.command(cmd_name, cls=Command)(_guarded(cmd_name, load(cmd_name)))
        return typer.main.get_command(app)


app = typer.Typer(
    name="ckpt",
    cls=Commands,
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
)


def _guarded(name: str, command: Callable[P, None]) -> Callable[P, None]:
    """Return a command whose errors become one line, a hint, and an exit code."""

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            if name in _WITH_NUMPY:
                spare_threads()
            command(*args, **options)
            sys.stdout.flush()
        except BaseException as error:
            code = end(error, json=bool(options.get("json")))
            if code is None:
                raise
            raise typer.Exit(code) from error

    return run


def _version(wanted: bool) -> None:
    if wanted:
        render.data(f"ckpt {version('ckptvcs')}")
        raise typer.Exit


def _show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="[COMMAND]", help="command")] = None,
    man: Annotated[bool, typer.Option("--man", help="print the manual page, for 'man'")] = False,
) -> None:
    """Print the help of a command."""
    root: Any = context.find_root()
    if man:
        from ckptvcs.cli.manual import page

        render.data(*page(root, GROUPS))
        return
    if command is None:
        render.data(*root.get_help().split("\n"))
        return
    found = root.command.get_command(root, command)
    if found is None:
        near = get_close_matches(command, COMMANDS)
        raise InvalidInputError(
            f"unknown command '{command}'",
            hint=f"did you mean '{near[0]}'?" if near else "run 'ckpt --help'",
        )
    shown = typer.Context(found, info_name=command, parent=root).get_help()
    render.data(*shown.split("\n"))


def _show_version() -> None:
    """Print the version."""
    _version(True)


_ABOUT: dict[str, Callable[..., None]] = {"help": _show_help, "version": _show_version}
_Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="print no notes and no progress; commit: only the id")
]


@app.callback()
def root(
    context: typer.Context,
    directory: Annotated[
        list[Path] | None, typer.Option("-C", metavar="DIR", help="run in this directory")
    ] = None,
    repo: Annotated[
        Path | None, typer.Option(metavar="PATH", help="repository directory [env: CKPT_DIR]")
    ] = None,
    quiet: _Quiet = False,
    _: Annotated[
        bool,
        typer.Option("-v", "--version", callback=_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Git for training runs: every checkpoint, in the space of a few."""
    render.be_quiet(quiet)
    for folder in directory or ():
        _change_to(folder)
    context.obj = Globals(repo)
    if context.invoked_subcommand is None:
        render.data(*context.get_help().split("\n"))
        raise typer.Exit(_NO_COMMAND)


def _change_to(folder: Path) -> None:
    """Run the command in a directory, as if it was started there.

    Raises:
        InvalidInputError: The directory cannot be entered.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise InvalidInputError(f"cannot change to {folder}: {error.strerror}") from error


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # unwinding removes temporary files and leases


def main() -> None:
    """Run the command line; docs/cli.md lists the exit codes."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    prepare_completion(os.environ)
    # The garbage collector would check these modules again and again: a tenth of `ckpt log`.
    gc.freeze()
    sys.exit(run())


def run() -> str | int | None:
    """Run the command line and return its exit code."""
    code: str | int | None = None
    try:
        code = app(standalone_mode=False) or 0
    except SystemExit as left:
        code = left.code
        end(left, json=wants_json())
    except BaseException as error:
        code = end(error, json=wants_json(), commands=(*COMMANDS, *_ABOUT))
        if code is None:
            if not isinstance(error, Exception):
                raise
            code = bug(error)
    try:
        sys.stdout.flush()
    except OutputError as error:
        code = code or end(error, json=wants_json())
    return code
