"""What runs in the process that commits in the background; see `worker.py`."""

from __future__ import annotations

import logging
import mmap
import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path

from ckptvcs.checkpoint.parcel import unpack
from ckptvcs.errors import CkptError
from ckptvcs.parallel import stay_in_background
from ckptvcs.repo import Repo
from ckptvcs.worker import Done, Failed, Job

_LOOK = 0.5  # seconds
_ROOMS = 2


def serve() -> None:
    """Commit what comes through a pipe, until it ends: [descriptor, parent, repository]."""
    descriptor, parent, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    threading.Thread(target=_watch, args=[parent], daemon=True).start()
    stay_in_background()
    pipe, rooms = Connection(descriptor), dict[int, memoryview]()
    repo: Repo | None = None
    with suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            if job is None:
                return
            assert isinstance(job, Job)
            if job.fresh:
                while len(rooms) >= _ROOMS:
                    del rooms[next(iter(rooms))]
                handle = recv_handle(pipe)
                rooms[job.room] = memoryview(mmap.mmap(handle, job.size))
                os.close(handle)
            answer: Done | Failed
            try:
                repo = repo or Repo.open(folder)
                answer = _commit(repo, job, rooms[job.room])
            except CkptError as error:
                answer = Failed(type(error), error.message, error.hint)
            except Exception as error:
                logging.getLogger("ckptvcs").exception("a commit in the background failed")
                answer = Failed(CkptError, f"{type(error).__name__}: {error}", None)
            pipe.send(answer)


def _commit(repo: Repo, job: Job, room: memoryview) -> Done:
    repo.read_settings()  # they may have been changed meanwhile
    made = repo.commit_checkpoint(unpack(job.parcel, room), **job.said)
    return Done(made.id, made.branch)


def _watch(parent: int) -> None:
    """End with the parent: training that starts again must find nobody at work."""
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)
