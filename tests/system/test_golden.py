"""Old repositories decode to the same bits, for ever.  A missing one fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from ckptvcs.text import from_number
from tests.spec_reader import SpecRepository

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [
    "v1-first",
    "v1-momenta",
    "v1-near",
    "v1-notes",
    "v1-patches",
    "v1-provenance",
    "v1-shared-bytes",
    "v1-types",
]


def test_all_are_listed() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_old_bytes_decode_to_the_same_bits(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name / "store", tmp_path / ".ckpt")
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert len(expected) >= 6
    repo = Repo.open(tmp_path)
    spec = SpecRepository(tmp_path / ".ckpt")
    for commit, digest in expected.items():
        repo.checkout_files(ObjectId(commit), tmp_path / "out.pt", force=True)
        data = (tmp_path / "out.pt").read_bytes()
        assert blake3(data).hexdigest() == digest
        assert (
            spec.file(commit, handle(repo).catalog.commit(ObjectId(commit)).files[0].path) == data
        )
    assert not repo.verify().damage
    assert repo.resolve("first") in expected


def test_old_notes_say_the_same(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "v1-notes" / "store", tmp_path / ".ckpt")
    expected = json.loads((GOLDEN / "v1-notes" / "notes.json").read_text())
    repo, spec = Repo.open(tmp_path), SpecRepository(tmp_path / ".ckpt")
    for commit, said in expected.items():
        entry = repo.entry(ObjectId(commit))
        metrics = {name: from_number(value) for name, value in entry.metrics.items()}
        assert {"message": entry.message, "metrics": metrics, "fields": entry.fields} == said
        assert spec.noted(commit) == said
    assert repo.show(2).metrics == {"eval": 0.25}
    assert len(repo.notes(2)) == 2


def test_old_provenance_says_the_same(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "v1-provenance" / "store", tmp_path / ".ckpt")
    expected = json.loads((GOLDEN / "v1-provenance" / "provenance.json").read_text())
    repo, spec = Repo.open(tmp_path), SpecRepository(tmp_path / ".ckpt")
    for commit, said in expected.items():
        found = repo.provenance(ObjectId(commit))
        assert (found and json.loads(json.dumps(found.as_json()))) == said
        assert spec.provenance(commit) == said
    assert len({json.dumps(said) for said in expected.values()}) == 3
