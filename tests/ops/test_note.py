"""Notes: what is written beside a commit counts wherever a message or a metric is read."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ckptvcs import Best, Policy, Repo
from ckptvcs.errors import InvalidInputError, NotFoundError, UnsupportedVersionError
from ckptvcs.history import catalog, format_file
from ckptvcs.history.canonical_json import dump
from ckptvcs.history.note import MAX_BYTES, MAX_NOTES, Note, dump_note
from ckptvcs.ops.history_reader import handle
from ckptvcs.store.ids import Kind, ObjectId
from tests.helpers.forging import Forger
from tests.spec_reader import SpecRepository

TIME = "2026-01-01T00:00:00.000000Z"


def fill(repo: Repo, count: int) -> None:
    """Commit steps 1 to `count`, each with metrics `loss` = step."""
    draw = np.random.default_rng(0)
    weight = draw.standard_normal(600, np.float32)
    for step in range(1, count + 1):
        weight = weight + np.float32(0.01) * draw.standard_normal(600, np.float32)
        repo.commit({"model": {"w": weight}}, step=step, metrics={"loss": step}, message=f"{step}")


@pytest.fixture
def run(tmp_path: Path) -> Repo:
    """Six commits, of which the two newest are exact."""
    repo = Repo.init(tmp_path)
    fill(repo, 6)
    return repo


def test_a_note_changes_what_is_read_and_no_id(run: Repo) -> None:
    before = [entry.id for entry in run.log()]
    run.note(3, message="evaluated", metrics={"eval": 0.5}, fields={"data": "wikitext"})
    run.note(3, metrics={"loss": 0.25})
    run.note(4, metrics={"eval": np.float64(0.75)})
    repo = Repo.open(run.folder)
    assert [entry.id for entry in repo.log()] == before
    entry = repo.show(3)
    assert (entry.message, entry.metrics) == ("evaluated", {"eval": 0.5, "loss": 0.25})
    assert entry.fields == {"data": "wikitext"}
    assert entry.commit.metrics == {"loss": 3.0}
    assert repo.resolve("best:eval:max") == repo.resolve(4)
    assert repo.resolve("best:loss") == repo.resolve(3)
    repo.note(2, metrics={"eval:loss": 0.1})
    assert repo.resolve("best:eval:loss:min") == repo.resolve(2)
    metadata = {name: (a, b) for name, a, b in repo.diff(3, 4).metadata}
    assert metadata["metrics.eval"] == (0.5, 0.75)
    assert [note.metrics for note in repo.notes(3)] == [{"loss": 0.25}, {"eval": 0.5}]
    assert [note.generation for note in repo.notes(3)] == [2, 1]
    assert not repo.verify().damage


def test_values_are_removed_and_set_again(run: Repo) -> None:
    run.note(1, metrics={"loss": None, "eval": 2.0}, fields={"a": "1"})
    assert run.show(1).metrics == {"eval": 2.0}
    run.note(1, fields={"a": None})
    assert run.show(1).fields == {}
    for values in ({"metrics": {"loss": None}}, {"fields": {"a": None}}):
        with pytest.raises(NotFoundError, match="has no"):
            run.note(1, **values)  # type: ignore[arg-type]
    run.note(1, metrics={"loss": 9.0}, message="")
    assert run.show(1).metrics == {"eval": 2.0, "loss": 9.0}
    assert run.show(1).message == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"message": 1},
        {"metrics": {"a": "1"}},
        {"metrics": {"": 1}},
        {"metrics": {1: None}},
        {"fields": {"a": 1}},
        {"fields": {"": "x"}},
        {"message": "x" * MAX_BYTES},
    ],
    ids=repr,
)
def test_a_wrong_note_is_refused_and_nothing_is_written(
    run: Repo, wrong: dict[str, object]
) -> None:
    with pytest.raises(InvalidInputError):
        run.note(1, **wrong)  # type: ignore[arg-type]
    assert run.notes(1) == []
    assert "notes" not in (run.folder / "format").read_text()


def test_a_dropped_or_unknown_commit_gets_no_note(run: Repo) -> None:
    dropped = run.resolve(2)
    run.gc(Policy(last=2), sweep=False)
    for revision in (f"id:{dropped}", 99):
        with pytest.raises(NotFoundError):
            run.note(revision, message="late")


def test_the_best_by_a_note_stays_exact_and_the_old_best_fades(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-best", "eval:min")
    fill(repo, 2)
    repo.note(2, metrics={"eval": 0.5})
    assert repo.is_best(2)
    fill_more(repo, 3, 3)
    assert exact(repo) == [1, 2, 4, 5]  # the keyframe needs no patch
    repo.note(4, metrics={"eval": 0.4})
    fill_more(repo, 6, 2)
    assert exact(repo) == [1, 4, 6, 7]
    repo.note(3, metrics={"eval": 0.1})  # it has faded before
    assert repo.is_best(3)
    repo.gc()
    assert exact(repo) == [1, 6, 7]
    assert not repo.verify().damage


def fill_more(repo: Repo, first: int, count: int) -> None:
    draw = np.random.default_rng(first)
    for step in range(first, first + count):
        weight = repo.checkout("HEAD")["model"]["w"] + draw.standard_normal(600, np.float32) / 100
        repo.commit({"model": {"w": weight}}, step=step)


def exact(repo: Repo) -> list[int]:
    return sorted(entry.step or 0 for entry in repo.log() if entry.exact)


def test_gc_rules_count_notes_and_keep_them(run: Repo) -> None:
    run.note(2, metrics={"eval": 0.1}, message="keep me")
    run.note(5, metrics={"eval": 0.9})
    for _ in range(3):  # the later ones merge packs
        run.gc(Policy(best=(Best("eval", "min"),)), rekey=True)
    repo = Repo.open(run.folder)
    assert [entry.step for entry in repo.log()] == [6, 2]
    assert (repo.show(2).message, repo.show(2).metrics["eval"]) == ("keep me", 0.1)
    assert not repo.verify().damage
    assert SpecRepository(run.folder).noted(repo.resolve(2))["metrics"]["eval"] == 0.1


def test_the_notes_of_deleted_commits_are_deleted(run: Repo) -> None:
    run.note("HEAD", message="mistake", metrics={"x": 1.0})
    run.undo()
    run.gc()
    assert handle(run).catalog.store.ids(Kind.NOTE) == []


def test_two_writers_lose_nothing(run: Repo) -> None:
    def write(number: int) -> None:
        repo = Repo.open(run.folder)
        for count in range(10):
            repo.note(1, metrics={f"m{number}": count, "both": number})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = run.show(1)
    assert (entry.metrics["m0"], entry.metrics["m1"]) == (9, 9)
    assert len(run.notes(1)) == 20
    newest = max(run.notes(1), key=lambda note: (note.generation, note.time))
    assert entry.metrics["both"] == newest.metrics["both"]


def test_an_open_repository_sees_the_notes_of_others(run: Repo) -> None:
    other = Repo.open(run.folder)
    other.log()
    run.note(1, metrics={"eval": 1.0})
    assert other.log()[-1].metrics["eval"] == 1.0


def test_a_program_without_notes_refuses_the_repository(
    run: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.note(1, message="x")
    known = format_file.FLAGS["read"] - {"notes"}
    monkeypatch.setitem(format_file.FLAGS, "read", known)
    with pytest.raises(UnsupportedVersionError, match="notes"):
        Repo.open(run.folder)


def test_a_commit_has_a_largest_number_of_notes(
    forger: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = handle(forger.repo).catalog.store
    with store.packing("meta") as pack:
        for number in range(MAX_NOTES):
            note = Note(forger.honest.id, number + 1, TIME, "", None, {f"m{number % 7}": number})
            pack.add(Kind.NOTE, dump_note(note))
    assert forger.repo.show().metrics["m0"] == max(range(0, MAX_NOTES, 7))
    with pytest.raises(InvalidInputError, match="notes"):
        forger.repo.note("HEAD", message="one more")


def test_readers_use_no_more_than_a_number_of_notes(
    forger: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MAX_READ", 5)
    with handle(forger.repo).catalog.store.packing("meta") as pack:
        for number in range(20):
            note = Note(forger.honest.id, 1, TIME, "", None, {f"m{number}": number})
            pack.add(Kind.NOTE, dump_note(note))
    assert len(forger.repo.show().metrics) == 5


def test_a_note_in_a_damaged_pack_is_repaired_from_the_index(run: Repo) -> None:
    run.note(3, message="still here")
    (name,) = handle(run).catalog.store.ids(Kind.NOTE)
    (place,) = handle(run).catalog.store.places(name)
    path = run.folder / place.folder / place.pack[:2] / f"{place.pack}.pack"
    content = bytearray(path.read_bytes())
    content[place.entry.offset + 110] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    (damage,) = run.verify().damage
    assert damage.what == "pack"
    assert damage.objects == (name,)
    run.repair()
    assert run.show(3).message == "still here"
    assert not run.verify().damage


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[" * 10_000,
        dump({"commit": "a" * 64}),
        b'{"commit":"%s","generation":1,"metrics":{"a":"x"},"time":"%s","user":""}'
        % (b"a" * 64, TIME.encode()),
        b" " * (1 << 20),
    ],
    ids=lambda content: content[:20].decode(),
)
@pytest.mark.parametrize("repairs", [False, True])
def test_an_invalid_note_is_ignored_reported_and_deleted(
    content: bytes, forger: Forger, repairs: bool
) -> None:
    content = content.replace(b"a" * 64, forger.honest.id.encode())
    name = forger.put(Kind.NOTE, content)
    repo = Repo.open(forger.repo.folder)
    assert repo.show().metrics == {}
    assert repo.notes() == []
    (damage,) = repo.verify().damage
    assert (damage.what, damage.name) == ("note", name)
    if repairs:
        repo.repair()
    else:
        repo.gc()
    assert not repo.verify().damage
    assert repo.show().message == "honest"


def test_a_repair_keeps_the_valid_notes_of_a_pack(forger: Forger) -> None:
    with handle(forger.repo).catalog.store.packing("meta") as pack:
        pack.add(Kind.NOTE, dump({"commit": forger.honest.id}))
        pack.add(Kind.NOTE, dump_note(Note(forger.honest.id, 1, TIME, "", "valid")))
    forger.repo.repair()
    assert forger.repo.show().message == "valid"
    assert not forger.repo.verify().damage


def test_a_note_of_an_unknown_commit_does_no_harm(forger: Forger) -> None:
    forger.put(Kind.NOTE, dump_note(Note(ObjectId("e" * 64), 1, TIME, "", "x", {"loss": 1.0})))
    assert forger.repo.show().message == "honest"
    assert not forger.repo.verify().damage
    forger.repo.gc()
    assert handle(forger.repo).catalog.store.ids(Kind.NOTE) == []


def test_values_that_are_not_finite_are_shown_and_never_best(run: Repo) -> None:
    run.note(1, metrics={"eval": float("nan")})
    run.note(2, metrics={"eval": float("-inf")})
    run.note(3, metrics={"eval": 1.0})
    assert run.show(2).metrics["eval"] == float("-inf")
    assert run.resolve("best:eval:min") == run.resolve(3)


def test_a_commit_that_repair_copies_keeps_its_notes(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path, codec="lossless")
    for step in range(1, 4):  # shapes differ, so that no commit depends on another
        repo.commit({"w": np.full(100 + step, step, np.float32)}, step=step)
    repo.note(3, message="still here")
    lost, old = repo.resolve(2), repo.resolve(3)
    (place,) = handle(repo).catalog.store.places(lost)
    (repo.folder / place.folder / place.pack[:2] / f"{place.pack}.pack").unlink()
    for file in (repo.folder / "cache").glob("index-*"):
        file.unlink()
    Repo.repair_at(tmp_path, drop=True)
    again = Repo.open(tmp_path)
    assert again.resolve(3) != old
    assert again.show(3).message == "still here"
