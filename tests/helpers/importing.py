"""Import folders and look at the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.repo import Repo

State = dict[str, Any]


def silent(_: object) -> None:
    return


def run(repo: Repo, folder: Path, **options: Any) -> Importer:
    """An import with nothing removed."""
    importer = Importer(handle(repo), folder, **options)
    importer.look(silent)
    importer.run(silent, silent)
    return importer


def remove(importer: Importer, *, accept_near: bool = False) -> dict[str, str | None]:
    """Why each checkpoint stays; None for those that are gone."""
    importer.remove(accept_near=accept_near, progress=silent, watch=silent)
    return {item.found.name: item.removal.keep_reason for item in importer.items}


def actions(importer: Importer) -> dict[str, str]:
    return {item.found.name: item.action for item in importer.items}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def messages(repo: Repo, revision: str | None = None) -> list[str]:
    return [entry.message for entry in repo.log(revision=revision)][::-1]


def branches(repo: Repo) -> list[str]:
    return handle(repo).refs.names("heads")


def save(folder: Path, states: list[State], name: str = "step-{}.pt") -> list[Path]:
    """Write states as step-800.pt, step-900.pt, step-1000.pt ..., without a step inside."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, state in enumerate(states):
        path = folder / name.format(800 + 100 * number)
        torch.save({key: value for key, value in state.items() if key != "step"}, path)
        paths.append(path)
    return paths
