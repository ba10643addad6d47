"""A backend on a temporary folder, on top of files elsewhere that it only reads."""

from __future__ import annotations

from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path

from ckptvcs.store.backend import Files
from ckptvcs.store.local import LocalBackend


class Layered(LocalBackend):
    """Writes below `root`, and reads there first, then from `below`."""

    def __init__(self, root: Path, below: Files) -> None:
        super().__init__(root)
        self._below = below

    def names(self, folder: str) -> Iterator[str]:
        return chain(super().names(folder), self._below.names(folder))

    def size(self, name: str) -> int:
        try:
            return super().size(name)
        except FileNotFoundError:
            return self._below.size(name)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            return super().read(name, offset, length)
        except FileNotFoundError:
            return self._below.read(name, offset, length)


class Some:
    """Some files of a backend."""

    def __init__(self, backend: Files, names: Set[str]) -> None:
        self._backend, self._names = backend, names

    def names(self, folder: str) -> Iterator[str]:
        return (name for name in sorted(self._names) if name.startswith(f"{folder}/"))

    def size(self, name: str) -> int:
        return self._backend.size(self._found(name))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._backend.read(self._found(name), offset, length)

    def _found(self, name: str) -> str:
        if name not in self._names:
            raise FileNotFoundError(name)
        return name
