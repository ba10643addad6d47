"""The main loop of the worker process; see `background/process.py`."""

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
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from ckptvcs.background.process import Done, Job
from ckptvcs.background.shared_state import unpack
from ckptvcs.errors import CkptError
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.repository import Repository
from ckptvcs.parallel import stay_in_background
from ckptvcs.store.leases import patience

_POLL_SECONDS = 0.5


def serve() -> None:
    """Commit the jobs of a pipe until it ends.

    The arguments of the process are the descriptor of the pipe, the id of the parent process, and
    the folder of the repository.  Each job brings its own memory, and the worker keeps none of it,
    so the two processes cannot disagree about a state.
    """
    descriptor, parent, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    threading.Thread(target=_watch, args=[parent], daemon=True).start()
    stay_in_background()
    pipe = Connection(descriptor)
    repository: Repository | None = None
    gc.freeze()  # spares `gc.collect` the loaded modules
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent ended
        while (job := pipe.recv()) is not None:
            assert isinstance(job, Job)
            handle = recv_handle(pipe)
            answer: Done | CkptError
            try:
                repository = repository or Repository(folder)
                answer = _commit(repository, job, handle, pipe)
            except CkptError as error:
                answer = type(error)(error.message, hint=error.hint)  # without its traceback
            except (BrokenPipeError, ConnectionResetError):  # the parent ended
                raise
            except Exception as error:
                logging.getLogger("ckptvcs").exception("background commit failed")
                answer = CkptError(f"{type(error).__name__}: {error}")
            finally:
                os.close(handle)
            if isinstance(answer, CkptError):
                repository = None  # the next commit opens the repository again
            pipe.send(answer)
            gc.collect()  # reference cycles hold the memory and the descriptor of a job


def _commit(repository: Repository, job: Job, handle: int, pipe: Connection) -> Done:
    state = unpack(job.state, memoryview(mmap.mmap(handle, job.size)))
    request = replace(job.request, checkpoint=state)
    with patience(math.inf):  # the copy is safe, and training does not wait
        result = commit_checkpoint(repository, request, announce=pipe.send)
    return Done(result.id, result.branch)


def _watch(parent: int) -> None:
    """End with the parent, so that a restarted training is the only writer."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
