"""The root of the command line: global options, commands, errors to exit codes."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup

from ckptvcs.cli import render
from ckptvcs.cli.context import Globals
from ckptvcs.cli.streams import OutputError, ReaderGoneError, prepare
from ckptvcs.errors import NO_MEMORY, CkptError, StorageError
from ckptvcs.parallel import spare_threads

P = ParamSpec("P")

INTERRUPTED = 130
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
_SUMMARY = 80  # characters; longer than every summary
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def load(command: str) -> Callable[..., None]:
    """Import the module of a command, and return its function."""
    module = import_module(f"ckptvcs.cli.{_MODULES.get(command, command)}")
    # `import` is a keyword of Python.
    function: Callable[..., None] = getattr(module, "import_" if command == "import" else command)
    return function


class Command(TyperCommand):
    """A command whose usage shows required arguments without braces, as in git."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class Commands(TyperGroup):
    """The commands; their modules are imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for title, names in GROUPS.items():
            commands = {name: self.get_command(ctx, name) for name in names}
            rows = [(name, row.get_short_help_str(_SUMMARY)) for name, row in commands.items()]
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
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
    no_args_is_help=True,
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
            code = _end(error)
            if code is None:
                raise
            raise typer.Exit(code) from error

    return run


def _end(error: BaseException) -> int | None:
    """Report the end of a command and return the exit code, or None for a bug or a plain exit."""
    done = "; ".join(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        render.talk(f"interrupted; {done or 'the repository is unchanged or complete'}")
        return INTERRUPTED
    if isinstance(error, SystemExit):
        if done:
            render.talk(f"terminated; {done}")
        return None
    refusal = _refusal(error)
    if refusal is None:
        return None
    if not isinstance(refusal, ReaderGoneError):
        message = f"{done}, but: {refusal.message}" if done else refusal.message
        render.talk(f"error: {render.printable(message)}")
        if refusal.hint:
            render.talk(f"hint: {render.printable(refusal.hint)}")
    return refusal.exit_code


def _refusal(error: BaseException) -> CkptError | None:
    """Return the error to show to the user; None for a bug."""
    if isinstance(error, CkptError):
        return error
    if isinstance(error, MemoryError):
        return StorageError(NO_MEMORY, hint="free some memory, or raise the limit (ulimit -v)")
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot use{where}: {error.strerror or error}")
    if isinstance(error, ImportError):
        while isinstance(error.__cause__, ImportError):  # numpy wraps it in a page of advice
            error = error.__cause__
        return StorageError(f"cannot load a module: {error}", hint="check that it is installed")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return StorageError(str(error), hint="raise the limit of processes (ulimit -u)")
    return None


def _version(wanted: bool) -> None:
    if wanted:
        render.data(f"ckpt {version('ckptvcs')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    repo: Annotated[
        Path | None, typer.Option(metavar="PATH", help="repository directory [env: CKPT_DIR]")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Git for training runs: every checkpoint, in the space of a few."""
    context.obj = Globals(repo)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinding removes temporary files and leases


def main() -> None:
    """Run the command line; docs/cli.md lists the exit codes."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    # The garbage collector would check these modules again and again: a tenth of `ckpt log`.
    gc.freeze()
    sys.exit(run())


def run() -> str | int | None:
    """Run the command line and return its exit code."""
    code: str | int | None = None
    try:
        code = render.run(app)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = _end(error)
        if code is None:
            if not isinstance(error, Exception):
                raise
            code = render.bug()
    try:
        sys.stdout.flush()
    except OutputError as error:
        code = code or _end(error)
    return code
