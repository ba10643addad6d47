"""The process that commits in the background, but it comes to grief at a chosen moment.

Started as `python -c "from tests.helpers.dying import serve; serve(moment, how, file, times)"`
with the arguments of `ckptvcs.background.server.serve`.  The file counts how often it happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptvcs.background import server
from ckptvcs.history.refs import Refs
from tests.helpers.patching import wrap

MOMENTS = ("start", "job", "announced", "branch", "answer")
"""Before anything; with a job; before a branch moves; before HEAD follows it; when all is done."""


def serve(moment: str, how: str, file: str, times: int) -> None:
    """Serve, and end by the signal `how`, or raise what is called so, the first `times` that the
    process comes to a moment while `file` is there.
    """

    def strike() -> None:
        counted = Path(file)
        if not counted.exists() or len(counted.read_text()) >= times:
            return
        with counted.open("a") as count:
            count.write("x")
        if how in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[how])
        raise {"KeyError": KeyError, "OSError": OSError}[how]("x")

    def before(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        strike()
        return function(*args, **kwargs)

    def after(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        strike()
        return result

    if moment == "start":
        strike()
    elif moment == "job":
        wrap(server, "commit_checkpoint", before)
    elif moment == "announced":
        wrap(Refs, "make", before)
    elif moment == "branch":
        wrap(Refs, "_take_head", before)
    elif moment == "answer":
        wrap(server, "commit_checkpoint", after)
    server.serve()
