"""Two commits decode together to what each decodes to alone, and share the work."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptvcs import CorruptionError, Repo
from ckptvcs.codec import frame
from ckptvcs.codec.words import word_type
from ckptvcs.decode import chain
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.decode.pair_reader import read_pairs
from ckptvcs.ops.history_reader import handle
from ckptvcs.parallel import quiet
from tests.helpers.training import train

GOLDEN = Path(__file__).parents[1] / "golden"


def joined(a: Restorer, b: Restorer) -> dict[int, tuple[bytes, bytes]]:
    """The bytes of each stored tensor of two commits of one schema, decoded together."""
    numbers = [n for n, info in enumerate(a.schema.tensors) if not info.inline and info.words]
    pairs = [(number, number) for number in numbers]
    read = read_pairs(a, b, pairs, lambda _, x, y: (x.tobytes(), y.tobytes()), quiet)
    found: dict[int, tuple[bytes, bytes]] = {}
    for (number, _), slices in read:
        found[number] = b"".join(x for x, _ in slices), b"".join(y for _, y in slices)
    assert [*found] == numbers
    return found


def assert_alike(a: Restorer, b: Restorer) -> None:
    for number, octets in joined(a, b).items():
        assert octets == (a.tensor(number).tobytes(), b.tensor(number).tobytes())


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    """Eight near commits, of which the last two are exact."""
    repo = Repo.init(tmp_path / "run")
    for state in train(8):
        repo.commit(state)
    repo.close()
    return Repo.open(tmp_path / "run")


def test_commits_decode_together_as_alone(run: Repo) -> None:
    names = [entry.id for entry in run.log()]
    for a, b in ((0, 1), (1, 0), (0, 3), (5, 2), (3, 4)):
        for near in (False, True):
            assert_alike(*(handle(run).restorer(names[age], near=near) for age in (a, b)))


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/store")))
def test_old_commits_decode_together_as_alone(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name / "store", tmp_path / ".ckpt")
    repo = Repo.open(tmp_path)
    entries = [e for e in repo.log(all_branches=True) if "dropped" not in e.fidelity.values()]
    compared = 0
    for a, b in combinations(entries, 2):
        if a.commit.schema == b.commit.schema:
            assert_alike(handle(repo).restorer(a.id), handle(repo).restorer(b.id))
            compared += 1
    assert compared


def test_common_frames_are_decoded_once(run: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    decode = frame.decode_slice

    def count(*args: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*args, **options)

    catalog = handle(run).catalog
    a, b = readers = [Restorer(catalog, run.log()[age].id) for age in (3, 2)]
    weights = readers[0].schema.stored("model")
    monkeypatch.setattr(chain, "decode_slice", count)
    for _ in read_pairs(a, b, [(n, n) for n in weights], lambda *_: None, quiet):
        pass
    together, decoded = decoded, 0
    for reader in readers:
        list(reader.tensors(weights))
    depths = [len(reader.links(number)) for reader in readers for number in weights]
    assert decoded == sum(depths)
    # The second commit adds one frame for each tensor.
    assert together == max(sum(depths[: len(weights)]), sum(depths[len(weights) :]))


def test_a_damaged_cache_changes_nothing(run: Repo, tmp_path: Path) -> None:
    names = [entry.id for entry in run.log()[:2]]
    run.checkout_files(names[1], tmp_path / "out.pt")
    files = list((run.folder / "cache" / "bases").iterdir())
    assert files
    catalog = handle(run).catalog
    expected = joined(Restorer(catalog, names[0]), Restorer(catalog, names[1]))
    for path in files:
        path.write_bytes(bytes(len(path.read_bytes())))
    a, b = (handle(run).restorer(name) for name in names)
    assert joined(a, b) == expected


def test_a_damaged_frame_is_found(run: Repo) -> None:
    entries = run.log()
    shutil.rmtree(run.folder / "cache")
    readers = [handle(run).restorer(entries[age].id, near=True) for age in (4, 0)]
    number = readers[0].schema.stored("model")[0]
    word = word_type(readers[0].schema.tensors[number].type.word)
    assert readers[0].tensor(number).view(word).size
    bundle = readers[1].links(number)[-1].bundle
    place = handle(run).catalog.store.places(bundle)[0]
    path = run.folder / place.folder / place.pack[:2] / f"{place.pack}.pack"
    offset = place.entry.offset - place.entry.region_bytes
    octets = np.frombuffer(path.read_bytes(), np.uint8).copy()
    octets[offset : offset + place.entry.region_bytes] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(octets.tobytes())
    with pytest.raises(CorruptionError):
        joined(readers[0], readers[1])
