"""Choose a part of a repository to verify, and remember when each pack and commit was checked."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptvcs.errors import InvalidInputError, StorageError
from ckptvcs.store import disk

_FORM = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[KMGT]|s|m|h)\Z")
_BYTES = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_MAX_BYTES = 1 << 28


class Checked:
    """The times of the last checks of packs and commits, in a file of the cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.times: dict[str, float] = {}
        if not path.is_file():  # opening a pipe would block
            return
        with contextlib.suppress(
            OSError, ValueError, AttributeError, RecursionError, OverflowError
        ):
            with path.open("rb") as file:
                found = json.loads(file.read(_MAX_BYTES))
            self.times = {str(k): float(v) for k, v in found.items() if isinstance(v, int | float)}

    def note(self, names: Iterable[str]) -> None:
        """Record that these packs and commits were checked now."""
        self.times |= dict.fromkeys(names, time.time())
        # A read-only repository can be verified, too.
        with contextlib.suppress(OSError, StorageError):
            disk.replace(self._path, json.dumps(self.times).encode(), self._path.parent)


@dataclass(frozen=True)
class Budget:
    """A limit: a share of all bytes (`%`), or bytes (`K` ... `T`), or a time (`s`, `m`, `h`)."""

    number: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse a budget such as `5%`, `10G` or `15m`.

        Raises:
            InvalidInputError: The form is unknown.
        """
        match = _FORM.match(text.strip())
        if match is None:
            raise InvalidInputError(
                f"invalid --subset '{text}'", hint="use a form such as 5%, 10G or 15m"
            )
        return cls(float(match[1]), match[2])

    def choose(self, checked: Checked, sizes: Mapping[str, int]) -> Iterator[str]:
        """Yield what to check, the longest unchecked first; at least one."""
        order = sorted(sizes, key=lambda name: checked.times.get(name, 0.0))
        units = {"%": sum(sizes.values()) / 100} | _BYTES | _SECONDS
        limit, is_time = self.number * units[self.unit], self.unit in _SECONDS
        started, taken = time.monotonic(), 0
        for name in order:
            used = time.monotonic() - started if is_time else taken + sizes[name]
            if taken and used > limit:
                return
            taken += max(1, sizes[name])
            yield name
