"""Old repositories decode to the same bits, for ever.  A missing one fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import from_number
from tests.spec_reader import SpecRepository, archive

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [
    "v1-archived",
    "v1-first",
    "v1-momenta",
    "v1-near",
    "v1-notes",
    "v1-patches",
    "v1-provenance",
    "v1-shared-bytes",
    "v1-sparse",
    "v1-types",
]
FILES = ["v1-archive"]
"""Bundle files."""


def test_all_are_listed() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted([*NAMES, *FILES])


def opened(name: str, file: str, folder: Path) -> tuple[Repo, SpecRepository, dict[str, Any]]:
    """Return a copy of a golden repository, for both readers, and what `file` expects of it."""
    shutil.copytree(GOLDEN / name / "store", folder / ".ckpt")
    expected = json.loads((GOLDEN / name / file).read_text())
    return Repo.open(folder), SpecRepository(folder / ".ckpt"), expected


def check(repo: Repo, spec: SpecRepository, expected: dict[str, str], out: Path) -> None:
    """Each commit of a repository gives the same bits, to a reader of the specification too."""
    for commit, digest in expected.items():
        repo.checkout_files(ObjectId(commit), out, force=True)
        data = out.read_bytes()
        assert blake3(data).hexdigest() == digest
        path = handle(repo).catalog.commit(ObjectId(commit)).files[0].path
        assert spec.file(commit, path) == data


@pytest.mark.parametrize("name", NAMES)
def test_old_bytes_decode_to_the_same_bits(name: str, tmp_path: Path) -> None:
    repo, spec, expected = opened(name, "expected.json", tmp_path)
    assert len(expected) >= 6
    check(repo, spec, expected, tmp_path / "out.pt")
    assert not repo.verify().damage
    assert repo.resolve("first") in expected


def test_old_notes_say_the_same(tmp_path: Path) -> None:
    repo, spec, expected = opened("v1-notes", "notes.json", tmp_path)
    for commit, said in expected.items():
        entry = repo.entry(ObjectId(commit))
        metrics = {name: from_number(value) for name, value in entry.metrics.items()}
        assert {"message": entry.message, "metrics": metrics, "fields": entry.fields} == said
        assert spec.noted(commit) == said
    assert repo.show(2).metrics == {"eval": 0.25}
    assert len(repo.notes(2)) == 2


def test_old_provenance_says_the_same(tmp_path: Path) -> None:
    repo, spec, expected = opened("v1-provenance", "provenance.json", tmp_path)
    for commit, said in expected.items():
        found = repo.provenance(ObjectId(commit))
        assert (found and json.loads(json.dumps(found.as_json()))) == said
        assert spec.provenance(commit) == said
    assert len({json.dumps(said) for said in expected.values()}) == 3


@pytest.mark.parametrize("name", FILES)
def test_old_bundle_files_give_the_same_bits(name: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    clone = Repo.clone(GOLDEN / name / "some.ckptz", tmp_path / "clone")
    manifest, spec = archive(GOLDEN / name / "some.ckptz")
    assert [row["id"] for row in manifest["commits"]] == list(expected)
    check(clone, spec, expected, tmp_path / "out.pt")
    assert not clone.verify().damage
    assert clone.show("good").message == "noted"


@pytest.mark.parametrize("name", NAMES)
def test_old_commits_travel_alone(name: str, tmp_path: Path) -> None:
    """Chains that older versions wrote are re-encoded without a change."""
    shutil.copytree(GOLDEN / name / "store", tmp_path / ".ckpt")
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    repo, newest = Repo.open(tmp_path), list(expected)[-1]
    repo.bundle(newest, tmp_path / "x.ckptz")
    clone, (_, spec) = (
        Repo.clone(tmp_path / "x.ckptz", tmp_path / "b"),
        archive(tmp_path / "x.ckptz"),
    )
    check(clone, spec, {newest: expected[newest]}, tmp_path / "out.pt")
    assert not clone.verify().damage
