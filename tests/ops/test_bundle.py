"""Bundle files: what they hold, and what a clone or a fetch makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptvcs import Policy, Repo
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.history.provenance import Provenance
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.request import Request
from ckptvcs.store.leases import check_lease
from ckptvcs.store.local import LocalBackend
from tests.helpers.bundling import history, steps
from tests.helpers.crashing import states


def same_values(repo: Repo, other: Repo, step: int) -> bool:
    """Whether both restore the same files of a step."""
    name = repo.resolve(step)
    one, two = (handle(side).restorer(name, near=True) for side in (repo, other))
    return [one.digest(f) for f in one.commit.files] == [two.digest(f) for f in two.commit.files]


@pytest.mark.parametrize("codec", ["near", "lossless", "excp"])
def test_a_clone_has_the_same_commits_and_works_at_once(tmp_path: Path, codec: str) -> None:
    repo = history(tmp_path / "a", codec=codec)
    repo.bundle(["2", "4..5"], tmp_path / "some.ckptz")
    clone = Repo.clone(tmp_path / "some.ckptz", tmp_path / "b")
    assert steps(clone) == [2, 4, 5]
    assert [entry.id for entry in clone.log()] == [repo.resolve(n) for n in (5, 4, 2)]
    assert all(same_values(repo, clone, step) for step in (2, 4, 5))
    assert not clone.verify().damage
    clone.commit(states(6)[-1], step=6)
    clone.gc()
    clone.gc(rekey=True)
    assert steps(clone) == [2, 4, 5, 6]
    assert not clone.verify().damage


def test_a_bundle_of_one_step_has_no_frames_of_others(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 12)
    one = repo.bundle(12, tmp_path / "one.ckptz", form="near")
    all_ = repo.bundle("..12", tmp_path / "all.ckptz", form="near")
    assert one.size_bytes < all_.size_bytes / 3
    clone = Repo.clone(one.path, tmp_path / "b")
    model = clone.log()[0].commit.parts["model"].values
    catalog = handle(clone).catalog
    assert {
        frame.depth for name in catalog.recipe(model).bundles for frame in catalog.bundle(name)
    } == {0}


def test_commits_are_bundled_as_they_are(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    done = repo.bundle("3..5", tmp_path / "x.ckptz")
    exact = {entry.id for entry in repo.log() if entry.exact}
    assert done.exact == exact
    assert len(exact) == 2
    clone = Repo.clone(done.path, tmp_path / "b")
    assert {entry.id for entry in clone.log() if entry.exact} == exact
    assert not clone.pins()


def test_near_leaves_out_exact_patches(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    near = repo.bundle(5, tmp_path / "near.ckptz", form="near")
    full = repo.bundle(5, tmp_path / "full.ckptz")
    assert (near.patch_bytes, near.exact) == (0, frozenset())
    assert 0 < full.patch_bytes < full.size_bytes - near.size_bytes + 1000
    clone = Repo.clone(near.path, tmp_path / "b")
    assert not clone.log()[0].exact
    assert not handle(clone).catalog.patches()
    assert not clone.verify().damage


def test_exact_refuses_near_commits_and_pins_the_others(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    with pytest.raises(InvalidInputError, match=r"step 1 \(.*\) and 2 more are not exact any more"):
        repo.bundle("1..5", tmp_path / "x.ckptz", form="exact")
    assert not (tmp_path / "x.ckptz").exists()
    repo.bundle("4..5", tmp_path / "x.ckptz", form="exact")
    clone = Repo.clone(tmp_path / "x.ckptz", tmp_path / "b")
    assert len(clone.pins()) == 2
    for state in states(8)[5:]:
        clone.commit(state, step=state["step"])
    clone.gc()
    assert {entry.step for entry in clone.log() if entry.exact} >= {4, 5}


def test_exact_accepts_lossless_commits_and_pins_nothing(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", codec="lossless")
    done = repo.bundle("1..5", tmp_path / "x.ckptz", form="exact")
    assert len(done.exact) == 5
    assert not Repo.clone(done.path, tmp_path / "b").pins()


def test_one_part_alone(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    done = repo.bundle(3, tmp_path / "x.ckptz", only="model")
    assert not done.exact
    clone = Repo.clone(done.path, tmp_path / "b")
    (entry,) = clone.log()
    assert dict(entry.fidelity) == {"model": "near", "optimizer": "dropped"}
    assert not clone.verify().damage
    clone.commit(states(4)[-1], step=4)
    clone.gc()
    assert not clone.verify().damage
    assert clone.fetch(repo.bundle(3, tmp_path / "y.ckptz").path).restored == (entry.id,)
    assert dict(clone.show(3).fidelity) == {"model": "near", "optimizer": "near"}
    assert not clone.verify().damage


def test_parts_that_gc_dropped_stay_away(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    repo.gc(Policy(optimizer_last=1), now=True)
    repo.bundle("2..4", tmp_path / "x.ckptz")
    clone = Repo.clone(tmp_path / "x.ckptz", tmp_path / "b")
    assert {entry.fidelity["optimizer"] for entry in clone.log()} == {"dropped"}
    assert not clone.verify().damage
    with pytest.raises(InvalidInputError, match="not exact"):
        repo.bundle(2, tmp_path / "y.ckptz", form="exact")


def test_dropped_commits_are_refused(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    name = repo.resolve(2)
    repo.gc(Policy(last=2))
    with pytest.raises(NotFoundError, match="dropped"):
        repo.bundle(name, tmp_path / "x.ckptz")


def test_an_existing_file_stays(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 1)
    (tmp_path / "x.ckptz").write_bytes(b"precious")
    with pytest.raises(ConflictError, match="exists"):
        repo.bundle(1, tmp_path / "x.ckptz")
    assert (tmp_path / "x.ckptz").read_bytes() == b"precious"
    repo.bundle(1, tmp_path / "x.ckptz", force=True)
    assert steps(Repo.clone(tmp_path / "x.ckptz", tmp_path / "b")) == [1]


def test_a_bundle_of_a_clone(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    clone = Repo.clone(repo.bundle("3..5", tmp_path / "x.ckptz").path, tmp_path / "b")
    again = Repo.clone(clone.bundle("4..", tmp_path / "y.ckptz").path, tmp_path / "c")
    assert steps(again) == [4, 5]
    assert same_values(repo, again, 4)
    assert not again.verify().damage


def test_branches_and_tags_travel(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    repo.tag("v1", 3)
    repo.branch("side", 4)
    repo.move_head("side")
    repo.commit(states(6)[-1], step=6)
    done = repo.bundle(["3", "main", "side"], tmp_path / "x.ckptz")
    assert set(done.refs) == {"heads/main", "heads/side", "tags/v1"}
    clone = Repo.clone(done.path, tmp_path / "b")
    assert {ref.name: ref.step for ref in clone.branches()} == {"main": 5, "side": 6}
    assert [ref.name for ref in clone.branches() if ref.current] == ["side"]
    assert {ref.name: ref.step for ref in clone.tags()} == {"v1": 3}


def test_a_commit_below_the_tip_gets_the_name_of_its_branch(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    clone = Repo.clone(repo.bundle(3, tmp_path / "x.ckptz").path, tmp_path / "b")
    assert [(ref.name, ref.step) for ref in clone.branches()] == [("main", 3)]


# -- clone -------------------------------------------------------------------------------------


def test_clone_refuses_a_repository(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 1)
    repo.bundle(1, tmp_path / "x.ckptz")
    with pytest.raises(ConflictError, match="exists"):
        Repo.clone(tmp_path / "x.ckptz", tmp_path / "a")


def test_clone_keeps_the_files_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history(tmp_path / "a", 1).bundle(1, tmp_path / "x.ckptz")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.py").write_text("pass")
    monkeypatch.chdir(tmp_path)
    Repo.clone("x.ckptz")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [".ckpt", "train.py"]


def test_a_file_without_stored_tensors(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "a")
    (tmp_path / "tiny").write_bytes(b"tiny")
    name = repo.commit_path(tmp_path / "tiny", message="x", raw=True).id
    clone = Repo.clone(repo.bundle("HEAD", tmp_path / "x.ckptz").path, tmp_path / "b")
    clone.checkout_files(name, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"tiny"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Repo.clone(tmp_path / "x.ckptz", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# -- fetch -------------------------------------------------------------------------------------


def test_fetch_moves_a_branch_forward(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    clone = Repo.clone(repo.bundle(3, tmp_path / "x.ckptz").path, tmp_path / "b")
    for state in states(6)[3:]:
        repo.commit(state, step=state["step"])
    done = clone.fetch(repo.bundle("5..6", tmp_path / "y.ckptz").path)
    assert (len(done.added), len(done.known)) == (2, 0)
    assert steps(clone) == [3, 5, 6]
    assert not clone.verify().damage
    again = clone.fetch(tmp_path / "y.ckptz")
    assert (again.added, again.refs, again.size_bytes) == ((), {}, 0)
    clone.undo()
    assert steps(clone) == [3]
    with pytest.raises(NotFoundError, match="nothing to undo"):
        clone.undo()


def test_fetch_fills_what_an_earlier_bundle_left_out(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 6)
    clone = Repo.clone(repo.bundle(6, tmp_path / "x.ckptz").path, tmp_path / "b")
    done = clone.fetch(repo.bundle("2..4", tmp_path / "y.ckptz").path)
    assert (len(done.added), done.restored, done.refs) == (3, (), {})
    assert steps(clone) == [2, 3, 4, 6]
    clone.fetch(repo.bundle("..", tmp_path / "z.ckptz").path)
    assert steps(clone) == [1, 2, 3, 4, 5, 6]
    clone.gc(rekey=True)
    assert not clone.verify().damage


def test_fetch_leaves_commits_alone_that_a_bundle_left_out(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    clone = Repo.clone(repo.bundle("..", tmp_path / "x.ckptz").path, tmp_path / "b")
    for state in states(6)[3:]:
        repo.commit(state, step=state["step"])
    clone.fetch(repo.bundle(6, tmp_path / "y.ckptz").path)
    assert steps(clone) == [1, 2, 3, 6]
    assert not clone.verify().damage


def test_undo_passes_over_what_a_bundle_left_out(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 6)
    clone = Repo.clone(repo.bundle("3..4", tmp_path / "x.ckptz").path, tmp_path / "b")
    clone.fetch(repo.bundle(6, tmp_path / "y.ckptz").path)
    clone.gc(Policy(last=1))
    assert steps(clone) == [6]
    assert "drop" in clone.undo().what
    assert steps(clone) == [3, 4, 6]
    assert "fetch" in clone.undo().what
    with pytest.raises(NotFoundError, match="nothing to undo"):
        clone.undo()
    assert steps(clone) == [3, 4]


def test_two_fetches_at_once(tmp_path: Path) -> None:
    """One has a commit whole of which the other has only the header."""
    repo = history(tmp_path / "a", 4)
    clone = Repo.clone(repo.bundle(1, tmp_path / "x.ckptz").path, tmp_path / "b")
    repo.bundle(4, tmp_path / "y.ckptz")
    repo.bundle("2..3", tmp_path / "z.ckptz")
    done: list[object] = []

    def meanwhile(_: int) -> None:
        if not done and any((clone.folder / "leases").iterdir()):  # the first one copies packs
            done.append(None)
            Repo.open(clone.root).fetch(tmp_path / "z.ckptz")

    clone.fetch(tmp_path / "y.ckptz", progress=meanwhile)
    assert done
    assert steps(clone) == [1, 2, 3, 4]
    clone.gc()
    assert not clone.verify().damage


def test_a_commit_while_refs_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays on its branch, and what was fetched goes to another one."""
    repo = history(tmp_path / "a", 3)
    clone = Repo.clone(repo.bundle(1, tmp_path / "x.ckptz").path, tmp_path / "b")
    repo.bundle("2..3", tmp_path / "y.ckptz")
    calls = []

    def meanwhile(backend: LocalBackend, name: str) -> None:
        calls.append(name)
        if len(calls) == 2:  # the branches were looked at
            Repo.open(clone.root).commit(states(9)[-1], step=9)
        check_lease(backend, name)

    monkeypatch.setattr("ckptvcs.ops.fetch.check_lease", meanwhile)
    done = clone.fetch(tmp_path / "y.ckptz")
    assert set(done.refs) == {"heads/main-2"}
    assert len(calls) == 4
    assert steps(clone) == [1, 9]
    assert [entry.step for entry in clone.log(revision="main-2")] == [3, 2, 1]


def test_branches_of_similar_names(tmp_path: Path) -> None:
    """No commit of a bundle is left without a branch."""
    repo = history(tmp_path / "a", 3)
    repo.branch("main-2", 1)
    repo.move_head("main-2")
    repo.commit(states(5)[-1], step=5)
    repo.bundle(["main", "main-2"], tmp_path / "x.ckptz")
    other = history(tmp_path / "b", 2)
    done = other.fetch(tmp_path / "x.ckptz")
    assert done.refs == {
        "heads/main-2": repo.resolve("main-2"),
        "heads/main-3": repo.resolve("main"),
    }
    assert steps(other) == [1, 2]


@pytest.mark.parametrize("now", [False, True])
def test_fetch_restores_what_gc_dropped(tmp_path: Path, now: bool) -> None:
    repo = history(tmp_path / "a")
    names = [repo.resolve(step) for step in (2, 3)]
    repo.bundle("2..3", tmp_path / "x.ckptz")
    repo.gc(Policy(last=1), now=now)
    assert steps(repo) == [5]
    done = repo.fetch(tmp_path / "x.ckptz")
    assert (done.added, list(done.restored)) == ((), names)
    assert steps(repo) == [2, 3, 5]
    repo.gc()
    assert not repo.verify().damage
    assert steps(repo) == [2, 3, 5]


def test_fetch_makes_a_near_commit_exact_again(tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    repo.bundle(5, tmp_path / "now.ckptz")
    repo.bundle(5, tmp_path / "pinned.ckptz", form="exact")
    for state in states(8)[5:]:
        repo.commit(state, step=state["step"])
    assert not repo.show(5).exact
    assert repo.fetch(tmp_path / "now.ckptz").exact_again == (repo.resolve(5),)
    assert repo.show(5).exact
    repo.gc()
    assert not repo.show(5).exact, "no rule keeps it"
    repo.fetch(tmp_path / "pinned.ckptz")
    repo.gc()
    assert repo.show(5).exact
    assert not repo.verify().damage


def test_branches_that_have_diverged(tmp_path: Path) -> None:
    ours = history(tmp_path / "a", 3)
    theirs = Repo.clone(ours.bundle("..", tmp_path / "x.ckptz").path, tmp_path / "b")
    mine = ours.commit(states(4)[-1], step=4)
    for state in states(6)[4:]:
        theirs.commit(state, step=state["step"])
    theirs.bundle(5, tmp_path / "y.ckptz")
    theirs.bundle("5..6", tmp_path / "z.ckptz")
    assert set(ours.fetch(tmp_path / "y.ckptz").refs) == {"heads/main-2"}
    assert ours.log()[0].id == mine.id
    assert ours.fetch(tmp_path / "y.ckptz").refs == {}
    assert ours.fetch(tmp_path / "z.ckptz").refs == {"heads/main-2": theirs.resolve(6)}
    with pytest.raises(ConflictError, match="other commits"):
        ours.fetch(tmp_path / "z.ckptz", branch="main")
    assert ours.log()[0].id == mine.id
    packs = sorted(ours.folder.glob("*/*/*.pack"))
    with pytest.raises(ConflictError, match="other commits"):
        ours.fetch(tmp_path / "z.ckptz", branch="main")
    assert sorted(ours.folder.glob("*/*/*.pack")) == packs
    assert set(ours.fetch(tmp_path / "z.ckptz", branch="friend").refs) == {"heads/friend"}
    assert not ours.verify().damage


def test_a_branch_cannot_have_several_tips(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    repo.branch("side", 2)
    repo.move_head("side")
    repo.commit(states(6)[-1], step=6)
    repo.bundle(["main", "side"], tmp_path / "x.ckptz")
    with pytest.raises(InvalidInputError, match="2 branches"):
        Repo.init(tmp_path / "b").fetch(tmp_path / "x.ckptz", branch="one")
    with pytest.raises(InvalidInputError, match="cannot name"):
        Repo.init(tmp_path / "b").fetch(tmp_path / "x.ckptz", branch="../up")


def test_a_tag_of_another_commit_stays(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    clone = Repo.clone(repo.bundle("..", tmp_path / "x.ckptz").path, tmp_path / "b")
    clone.tag("v1", 1)
    repo.tag("v1", 2)
    done = clone.fetch(repo.bundle("..", tmp_path / "y.ckptz").path)
    assert (done.refs, done.kept) == ({}, ("v1",))
    assert clone.resolve("v1") == repo.resolve(1)


def test_notes_travel(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    repo.note(2, message="better", metrics={"val": 0.5})
    clone = Repo.clone(repo.bundle("2..3", tmp_path / "x.ckptz").path, tmp_path / "b")
    assert (clone.show(2).message, clone.show(2).metrics["val"]) == ("better", 0.5)
    repo.note(3, fields={"judge": "me"})
    done = clone.fetch(repo.bundle(3, tmp_path / "y.ckptz").path)
    assert (len(done.known), done.notes) == (1, 1)
    assert [note.fields for note in clone.notes(3)] == [{"judge": "me"}]
    assert clone.fetch(tmp_path / "y.ckptz").notes == 0
    clone.gc()
    assert not clone.verify().damage
    clone.note(2, message="best")
    assert clone.show(2).message == "best"


def test_provenance_travels(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 1)
    origin = Provenance("/run", "3.11", "Linux", {"torch": "2"})
    for state in states(3)[1:]:
        request = Request(step=state["step"], checkpoint=state_checkpoint(state), origin=origin)
        commit_checkpoint(handle(repo), request)
    clone = Repo.clone(repo.bundle("..", tmp_path / "x.ckptz").path, tmp_path / "b")
    assert [clone.provenance(step) for step in (1, 2, 3)] == [None, origin, origin]
    assert not clone.verify().damage


def test_fetch_into_an_empty_repository(tmp_path: Path) -> None:
    repo = history(tmp_path / "a", 3)
    other = Repo.init(tmp_path / "b")
    other.fetch(repo.bundle("2..3", tmp_path / "x.ckptz").path)
    assert steps(other) == [2, 3]
    assert not other.verify().damage


def test_chains_of_both_sides_fit_together(tmp_path: Path) -> None:
    """Commits depend on a table that is deeper here than there, or less deep."""
    repo = history(tmp_path / "a", 8)
    repo.configure("keyframe-depth", "3")
    for name, revisions in (("x", "5..8"), ("y", "3..6"), ("z", "..")):
        repo.bundle(revisions, tmp_path / f"{name}.ckptz")
    repo.gc(rekey=True)
    repo.bundle("4..7", tmp_path / "w.ckptz")
    for order in ("wyxz", "zxw", "yw"):
        other = Repo.init(tmp_path / order)
        for name in order:
            other.fetch(tmp_path / f"{name}.ckptz")
            assert not other.verify().damage, (order, name)
        assert all(same_values(repo, other, step or 0) for step in steps(other))
        other.gc()
        assert not other.verify().damage, order


@pytest.mark.parametrize("form", ["exact", "near", None])
def test_a_part_that_a_commit_lacks_is_not_bundled(form: str | None, tmp_path: Path) -> None:
    repo = history(tmp_path / "a")
    repo.gc(Policy(optimizer_last=1), now=True)
    with pytest.raises(NotFoundError, match=r"no part 'optimizer' in step 1 .* and 1 more"):
        repo.bundle("1..2", tmp_path / "x.ckptz", only="optimizer", form=form)
    with pytest.raises(NotFoundError, match="no part 'rest' in step 2"):
        repo.bundle(2, tmp_path / "x.ckptz", only="rest", form=form)
    assert not (tmp_path / "x.ckptz").exists()


def test_what_a_file_does_not_contain_takes_no_space(tmp_path: Path) -> None:
    clone = Repo.clone(history(tmp_path / "a").bundle(3, tmp_path / "x.ckptz").path, tmp_path / "b")
    left_out = [e for e in clone.log(all_branches=True) if set(e.fidelity.values()) == {"dropped"}]
    tip = clone.show(3)
    assert {e.stored_bytes for e in left_out} == {tip.stored_bytes - tip.commit.data_bytes}
