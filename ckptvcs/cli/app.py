"""The root of the command line: global options, commands, errors to exit codes."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, ParamSpec

import typer

from ckptvcs.cli import (
    compare,
    files,
    history,
    importing,
    maintain,
    refs,
    render,
    retain,
    study,
    watch,
)
from ckptvcs.cli.context import Globals
from ckptvcs.errors import CkptError, StorageError

P = ParamSpec("P")

INTERRUPTED = 130

app = typer.Typer(
    name="ckpt", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors become one line, a hint, and an exit code.

    Anything that is no CkptError is a bug, and shows its traceback.
    """

    @wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        try:
            command(*args, **options)
            sys.stdout.flush()
        except CkptError as error:
            render.talk(f"error: {render.printable(error.message)}")
            if error.hint:
                render.talk(f"hint: {render.printable(error.hint)}")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            render.talk("interrupted; nothing was half-written")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # The reader of stdout has gone (`ckpt log | head`): nothing more to say to anybody.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            render.talk(f"error: cannot use{where}: {error.strerror or error}")
            raise typer.Exit(StorageError.exit_code) from error

    return run


for _command in (
    maintain.init, files.commit, importing.import_, watch.watch, history.log, history.show,
    history.status, files.checkout, study.export, study.cat, study.average, compare.diff,
    compare.bisect, refs.branch, refs.tag, refs.pin, refs.unpin, retain.gc, retain.undo,
    retain.reflog, maintain.config, maintain.verify, maintain.stats, maintain.index,
):  # fmt: skip
    # `import` is a word of Python, so that its function has an underscore behind it.
    app.command(_command.__name__.rstrip("_"))(_guarded(_command))


def _version(wanted: bool) -> None:
    if wanted:
        render.data(f"ckpt {version('ckptvcs')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    repo: Annotated[
        Path | None, typer.Option(metavar="PATH", help="the repository [env: CKPT_DIR]")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Git for training runs: every checkpoint, in the space of a few."""
    context.obj = Globals(repo)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)  # unwinds: temporary files and leases are removed


def main() -> None:
    """Run the command line; exits with the codes that docs/cli.md lists."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of the time before there was an `app`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A stream that was closed is none, and the next file that is opened would have its number.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may be one that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    # What is loaded now stays: looking through it again and again is a tenth of `ckpt log`.
    gc.freeze()
    try:
        render.run(app)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
