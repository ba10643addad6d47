"""The provenance of a commit: who made it, with which code, packages and machine.

Nothing here calls git or another program, imports a package, or starts a GPU.
"""

from __future__ import annotations

import getpass
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptvcs.history.provenance import CodeState, Provenance
from ckptvcs.ops.git.head import Clone, find_clone
from ckptvcs.ops.git.state import read_code
from ckptvcs.parallel import shared_pool

if TYPE_CHECKING:
    from ckptvcs.ops.config import Config

_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "ckptvcs",
    "datasets",
    "deepspeed",
    "diffusers",
    "flash-attn",
    "flax",
    "jax",
    "jaxlib",
    "lightning",
    "megatron-core",
    "numpy",
    "optax",
    "peft",
    "pytorch-lightning",
    "safetensors",
    "tensorflow",
    "timm",
    "tokenizers",
    "torch",
    "torchao",
    "torchvision",
    "transformer-engine",
    "transformers",
    "triton",
    "trl",
    "xformers",
)
_KEPT = 8  # states of clones


def user() -> str:
    """Return the name of the user; "" if the system has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        return ""


def code_commit() -> str | None:
    """Return the git commit of the working directory; None if it is not in a git repository."""
    clone = _clone()
    return None if clone is None else clone.commit


def capture(config: Config, runs: Mapping[str, str] | None = None) -> Provenance | None:
    """Return the provenance of this process; None if the settings record none.

    Args:
        config: The settings.
        runs: The active runs of trackers, if another thread trains.
    """
    if config.provenance == "off":
        return None
    system = os.uname()
    return Provenance(
        folder=_folder(),
        python=platform.python_version(),
        platform=f"{system.sysname} {system.release} {system.machine}",
        packages=_packages(),
        gpus=_gpus(),
        runs=tracker_runs() if runs is None else runs,
        argv=tuple(map(_plain, sys.argv)) if config.provenance_argv == "on" else None,
        code=_code(diff=config.provenance == "full"),
    )


def capture_later(config: Config) -> Callable[[], Provenance | None]:
    """Return a function that captures the provenance, with the runs of this thread."""
    return partial(capture, config, tracker_runs())


def capture_beside(config: Config) -> Callable[[], Provenance | None]:
    """Begin `capture` in another thread, and return a function that waits for its result.

    A clone with many files is read while the commit hashes and encodes.
    """
    if config.provenance == "off":
        return lambda: None
    return shared_pool(os.getpid(), background=False).start(capture_later(config)).result


def tracker_runs() -> dict[str, str]:
    """Return the ids of the active runs of experiment trackers that this process has imported."""
    found = {}
    for name, run_of in _TRACKERS.items():
        module = sys.modules.get(name)
        with suppress(Exception):  # a tracker may not be what this program expects
            run = None if module is None else run_of(module)
            if run:
                found[name] = _plain(run)
    return found


def _wandb(module: Any) -> str:
    run = module.run
    return "" if run is None else "/".join(filter(None, (run.entity, run.project, run.id)))


def _mlflow(module: Any) -> str:
    run = module.active_run()  # reads a variable of the thread
    return "" if run is None else str(run.info.run_id)


def _trackio(module: Any) -> str:
    run = module.context_vars.current_run.get()
    return "" if run is None else "/".join(filter(None, (run.project, run.name)))


_TRACKERS: dict[str, Callable[[Any], str]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _plain(text: str) -> str:
    """Return text that every program can read: file names may be any bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _folder() -> str:
    try:
        return _plain(str(Path.cwd()))
    except OSError:  # it was deleted
        return ""


def _clone() -> Clone | None:
    with suppress(OSError):
        return find_clone(Path.cwd())
    return None


def _code(*, diff: bool) -> CodeState | None:
    """Return the state of the code; it is read again when git has changed HEAD or the index."""
    clone, changed = _clone(), 0
    if clone is None:
        return None
    if not _is_trusted(clone):
        return CodeState(clone.commit, clone.branch, None, complete=False)
    with suppress(OSError):
        changed = (clone.folder / "index").stat().st_mtime_ns
    return _read_code(clone, changed, diff)


def _is_trusted(clone: Clone) -> bool:
    """Return whether the user of this process, or the owner of its folder, owns the clone.

    Somebody else may have made a clone above the folder, and in its index named private files of
    the user, so that a diff would show them to everybody who may read the repository.
    """
    try:
        return clone.folder.stat().st_uid in (os.geteuid(), Path.cwd().stat().st_uid)
    except OSError:
        return False


@lru_cache(_KEPT)
def _read_code(clone: Clone, _changed: int, diff: bool) -> CodeState:
    with suppress(Exception):  # a commit must not fail for this
        return read_code(clone, diff=diff)
    return CodeState(clone.commit, clone.branch, None, complete=False)


@cache
def _packages() -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for name in _PACKAGES:
        with suppress(Exception):  # not installed, or its metadata are damaged
            found[name] = _plain(metadata.version(name))
    return found


def _gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that torch uses in this process."""
    torch = sys.modules.get("torch")
    with suppress(Exception):  # a driver may fail
        if torch is not None and torch.cuda.is_initialized():
            count = torch.cuda.device_count()
            return tuple(_plain(torch.cuda.get_device_name(number)) for number in range(count))
    return ()
