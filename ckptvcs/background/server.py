"""What runs in the process that commits in the background; see `background/process.py`."""

from __future__ import annotations

import gc
import logging
import math
import mmap
import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from ckptvcs.background.process import Done, Failed, Job
from ckptvcs.background.shared_state import unpack
from ckptvcs.errors import CkptError
from ckptvcs.history.refs import Move
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import stay_in_background
from ckptvcs.store.leases import patience

_LOOK = 0.5  # seconds


def serve() -> None:
    """Commit what comes through a pipe, until it ends: [descriptor, parent, repository].

    Each job brings its own memory, and nothing of it stays: there is nothing on which the two
    processes could come to disagree.
    """
    descriptor, parent, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    threading.Thread(target=_watch, args=[parent], daemon=True).start()
    stay_in_background()
    pipe = Connection(descriptor)
    repository: Repository | None = None
    gc.freeze()  # what is loaded stays, and is not looked through each time
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while (job := pipe.recv()) is not None:
            assert isinstance(job, Job)
            handle = recv_handle(pipe)
            answer: Done | Failed
            try:
                repository = repository or Repository(folder)
                answer = _commit(repository, job, handle, pipe)
            except CkptError as error:
                answer = Failed(type(error), error.message, error.hint)
            except Exception as error:
                logging.getLogger("ckptvcs").exception("a commit in the background failed")
                answer = Failed(CkptError, f"{type(error).__name__}: {error}", None)
            finally:
                os.close(handle)
            if isinstance(answer, Failed):
                repository = None  # the next commit starts from what is on the disk
            pipe.send(answer)
            gc.collect()  # the memory of a job lies in cycles, with a descriptor of its own


def _commit(repository: Repository, job: Job, handle: int, pipe: Connection) -> Done:
    def announce(move: Move) -> None:
        pipe.send(move)

    def commit() -> Done:
        state = unpack(job.parcel, room)
        made = commit_checkpoint(repository, state, **job.said, announce=announce)
        return Done(made.id, made.branch)

    room = memoryview(mmap.mmap(handle, job.size))
    with patience(math.inf):  # the copy is safe, and nobody waits for it
        return commit()


def _watch(parent: int) -> None:
    """End with the parent: training that starts again must find nobody at work."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)
