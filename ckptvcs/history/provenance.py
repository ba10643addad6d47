"""The provenance object: where the commits of a run come from.

All commits of one run share it, because equal content has one id.  Layout: docs/format.md,
"Provenance".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ckptvcs.history.canonical_json import Json
from ckptvcs.history.fields import TEXT, Fields, mapping, optional

PROVENANCE = "provenance"
"""Name of the droppable provenance of a commit, beside the parts."""


@dataclass(frozen=True)
class CodeState:
    """The git repository of the training code.

    Attributes:
        commit: The id of the commit that was checked out.
        branch: The branch; None if HEAD was detached.
        dirty: Whether tracked files differed from the commit; None if that is not known.
        changed: The paths of these files.
        untracked: The paths of files that git neither tracks nor ignores; a folder of such files
            ends with `/`.
        diff: The differences from the commit, as `git apply` reads them; None if they were not
            recorded.
        complete: Whether nothing was left out for its size, for lack of time, or because an object
            of the repository was missing.
    """

    commit: str
    branch: str | None
    dirty: bool | None
    changed: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()
    diff: str | None = None
    complete: bool = True


@dataclass(frozen=True)
class Provenance:
    """Where a commit comes from: the process that made it, and the code that it ran.

    Attributes:
        folder: The working directory.
        python: The version of Python.
        platform: The operating system, its version, and the type of the processor.
        packages: The versions of installed packages for machine learning, by name.
        gpus: The names of the GPUs, if the process used torch with them.
        runs: The ids of the active runs of experiment trackers, by the name of the tracker.
        argv: The command line; None if it was not recorded.
        code: The git repository; None without one.
    """

    folder: str
    python: str
    platform: str
    packages: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    runs: Mapping[str, str] = field(default_factory=dict)
    argv: tuple[str, ...] | None = None
    code: CodeState | None = None

    @property
    def code_commit(self) -> str | None:
        """The id of the git commit of the code, if there is one."""
        return None if self.code is None else self.code.commit

    def as_json(self) -> dict[str, Json]:
        """Return the fields as lists, objects, text and null."""
        return asdict(self)


_TEXTS = mapping(TEXT)._replace(default={})
_CODE = Fields(CodeState)
_PROVENANCE = Fields(Provenance, packages=_TEXTS, runs=_TEXTS, code=optional(_CODE.type))
dump_provenance = _PROVENANCE.dump


def load_provenance(data: bytes) -> Provenance:
    """Parse a provenance object.  Raises CorruptionError."""
    return _PROVENANCE.load(data, "a provenance object")
