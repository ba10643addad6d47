"""Archived commits lie on a piecewise-linear trajectory, and the record says how far they are off.

The repository has ten commits of a run whose weights drift and jitter.  Every third is an anchor.
"""

from __future__ import annotations

import math
import shutil
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ckptvcs import Archived
from ckptvcs.errors import ConflictError
from ckptvcs.gc.retention import Policy
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from tests.helpers.comparing import same
from tests.helpers.profiles import short
from tests.helpers.states import State, adam_state, weights

COMMITS = 10
SETTINGS = {"keep-exact": "1", "archive-every": "3", "provenance": "off"}


def walk(count: int, *, jump: int = 0, dtype: torch.dtype = torch.float32) -> list[State]:
    """States whose weights drift and jitter; at state number `jump` they jump."""
    torch.manual_seed(5)
    now, drift = weights(), {name: torch.randn(w.shape) * 3e-4 for name, w in weights().items()}
    states = []
    for number in range(1, count + 1):
        size = 2e-2 if number == jump else 3e-4
        now = {n: w + drift[n] + torch.randn(w.shape) * size for n, w in now.items()}
        state = adam_state({n: w.to(dtype) for n, w in now.items()}, 10 * number)
        state["model"]["frozen"] = torch.full((40, 40), 0.25)
        state["model"]["counts"] = torch.arange(400) * number
        states.append(state)
    return states


def committed(folder: Path, states: list[State]) -> Repo:
    repo = Repo.init(folder)
    for key, value in SETTINGS.items():
        repo.configure(key, value)
    for state in states:
        repo.commit(state, step=state["step"], metrics={"loss": 1 / state["step"]})
    return repo


@pytest.fixture(scope="module")
def states() -> list[State]:
    return walk(COMMITS)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, states: list[State]) -> Path:
    folder = tmp_path_factory.mktemp("archived")
    committed(folder, states)
    return folder


@pytest.fixture
def repo(tmp_path: Path, template: Path) -> Repo:
    shutil.copytree(template, tmp_path / "run")
    return Repo.open(tmp_path / "run")


def forms(repo: Repo, revision: str = "HEAD") -> str:
    """The form of the weights of each commit of a line, oldest first."""
    letters = {"exact": "E", "near": "n", "archived": "a", "dropped": "-"}
    names = repo.select([f"10..{revision}"])
    return "".join(letters[repo.entry(name).fidelity["model"]] for name in names)


def anchors(rows: tuple[Archived, ...]) -> str:
    return "".join("-" if row.between else "A" for row in rows)


def distance(a: State, b: State) -> float:
    names = [n for n, w in a["model"].items() if w.is_floating_point()]
    pairs = ((a["model"][n].double(), b["model"][n].double()) for n in names)
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs))


# -- what is archived ------------------------------------------------------------------------------


def test_the_middle_of_a_history_is_archived(repo: Repo) -> None:
    """The first commit is the first anchor; what is left after the last anchor stays near."""
    repo.configure("archive-after", "2")
    plan = repo.gc(now=True)  # the setting says that every gc archives
    assert forms(repo) == "naaaaaannE"
    assert anchors(plan.archived) == "--A--A"
    assert not repo.verify().damage


def test_gc_goes_on_where_the_last_one_ended(repo: Repo, states: list[State]) -> None:
    repo.configure("archive-after", "4")
    assert anchors(repo.gc(now=True, archive=True).archived) == "--A"
    assert forms(repo) == "naaannnnnE"
    before = {step: repo.checkout(step) for step in (20, 30, 40)}
    repo.configure("archive-after", "1")
    assert anchors(repo.gc(now=True, archive=True).archived) == "--A"
    assert forms(repo) == "naaaaaannE"
    assert not repo.gc(now=True, archive=True).archived
    for step, state in before.items():
        assert same(repo.checkout(step), state)
    assert not repo.verify().damage


def test_chains_of_anchors_have_keyframes(tmp_path: Path) -> None:
    """A checkout of any commit decodes at most as many frames as the setting allows."""
    repo = committed(tmp_path, walk(14))
    repo.configure("keyframe-depth", "2")
    repo.configure("archive-every", "2")
    plan = repo.gc(now=True, archive=True)
    assert anchors(plan.archived) == "-A" * 6
    catalog = handle(repo).catalog
    for entry in repo.log():
        for state in entry.commit.parts.values():
            count = len(catalog.values(state.values))
            assert all(catalog.depth(state.values, position) <= 3 for position in range(count))
    assert not repo.verify().damage


@pytest.mark.parametrize("kept", short(["tag", "pin", "best", "rule"], ["rule"]))
def test_a_protected_commit_stays_and_serves_as_an_anchor(
    repo: Repo, states: list[State], kept: str
) -> None:
    policy = Policy()
    if kept == "tag":
        repo.tag("mine", 50)
    elif kept == "pin":
        repo.pin(repo.resolve(50))
    elif kept == "best":
        repo.note(50, metrics={"score": 1.0})
        repo.configure("keep-best", "score:max")
    else:
        policy = Policy(every=50)
    near = repo.checkout(50)
    plan = repo.gc(policy, now=True, archive=True)
    assert forms(repo) == "naaanaaanE"
    assert anchors(plan.archived) == "--A--A"
    assert same(repo.checkout(50), near)
    assert not repo.verify().damage


def test_commits_in_front_of_a_protected_one_end_there(repo: Repo) -> None:
    repo.tag("mine", 60)
    plan = repo.gc(now=True, archive=True)
    assert forms(repo) == "naaaanaaaE"
    assert anchors(plan.archived) == "--A---A"
    assert not repo.verify().damage


def test_a_fork_is_an_anchor_and_both_lines_are_archived(repo: Repo, states: list[State]) -> None:
    repo.branch("side", 50)
    repo.move_head("side")
    for state in walk(COMMITS)[5:]:
        repo.commit(state, step=state["step"] + 1)
    plan = repo.gc(now=True, archive=True)
    assert forms(repo, "main") == "naaaaaaanE"
    rows = {row.commit: row for row in plan.archived}
    assert not rows[repo.resolve(50)].between
    assert repo.show("side~1").fidelity["model"] in ("near", "archived")
    assert not repo.verify().damage


def test_a_branch_from_an_archived_commit(repo: Repo, states: list[State]) -> None:
    """Its first commit is based on the anchor before: no frame is based on an interpolation."""
    repo.gc(now=True, archive=True)
    repo.branch("side", 30)
    repo.move_head("side")
    for state in states[3:9]:
        repo.commit(state, step=state["step"] + 1)
    newest = repo.checkout("side")
    assert same(newest["model"], states[8]["model"])
    assert not repo.verify().damage
    assert repo.gc(now=True, archive=True).archived
    assert not repo.verify().damage


@pytest.mark.parametrize("number", short([2, 5, 9], [5]))
def test_a_jump_stays_within_the_bound(tmp_path: Path, number: int) -> None:
    """Commits around it become anchors, or stay near."""
    repo = committed(tmp_path, walk(12, jump=number))
    repo.configure("archive-lag", "2")
    plan = repo.gc(now=True, archive=True)
    assert plan.archived
    assert all((row.error.lag or 0) <= 2 for row in plan.archived)
    assert not repo.verify().damage


def test_commits_with_nan_stay_near(tmp_path: Path) -> None:
    states = walk(12)
    states[4]["model"]["layer1"][3, 3] = float("nan")
    repo = committed(tmp_path, states)
    repo.gc(now=True, archive=True)
    assert forms(repo)[4] == "n"
    assert "a" in forms(repo)[5:]
    assert not repo.verify().damage


def test_a_commit_with_other_tensors_begins_again(tmp_path: Path) -> None:
    states = walk(12)
    for state in states[5:]:
        state["model"]["new"] = torch.ones(20, 20) * state["step"]
    repo = committed(tmp_path, states)
    assert anchors(repo.gc(now=True, archive=True).archived) == "--A--A"
    assert forms(repo) == "naaannaaannE"
    assert not repo.verify().damage


def test_a_dropped_optimizer_stays_dropped(repo: Repo) -> None:
    repo.gc(Policy(optimizer_last=2), now=True)
    repo.gc(now=True, archive=True)
    entry = repo.show(40)
    assert entry.fidelity == {"model": "archived", "optimizer": "dropped"}
    assert not repo.verify().damage


def test_archiving_goes_on_after_optimizers_were_dropped(repo: Repo) -> None:
    repo.configure("archive-after", "4")
    repo.gc(now=True, archive=True)
    repo.gc(Policy(optimizer_last=1), now=True, archive=False)
    repo.configure("archive-after", "1")
    assert anchors(repo.gc(now=True, archive=True).archived) == "--A"
    assert forms(repo) == "naaaaaannE"
    assert not repo.verify().damage


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_clone_of_one_part(repo: Repo, tmp_path: Path, part: str) -> None:
    repo.bundle("10..HEAD", tmp_path / "part.ckptz", only=part)
    clone = Repo.clone(tmp_path / "part.ckptz", tmp_path / "clone")
    for key, value in SETTINGS.items():
        clone.configure(key, value)
    assert clone.gc(now=True, archive=True).archived
    assert not clone.verify().damage


@pytest.mark.parametrize(
    "dtype", short([torch.bfloat16, torch.float16, torch.float64], [torch.bfloat16])
)
def test_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    repo = committed(tmp_path, walk(9, dtype=dtype))
    plan = repo.gc(now=True, archive=True)
    assert anchors(plan.archived) == "--A--A"
    assert repo.checkout(30)["model"]["layer0"].dtype == dtype
    assert not repo.verify().damage


# -- what comes back -------------------------------------------------------------------------------


def test_commits_are_within_their_recorded_error(repo: Repo, states: list[State]) -> None:
    plan = repo.gc(now=True, archive=True)
    true = {state["step"]: state for state in states}
    for row in plan.archived:
        entry = repo.entry(row.commit)
        found, original = repo.checkout(row.commit), true[entry.commit.step or 0]
        nothing = {"model": {name: torch.zeros(()) for name in original["model"]}}
        off, lag = distance(found, original), row.error.lag
        assert off <= row.error.weight_rel * distance(original, nothing)
        movement = distance(original, true[original["step"] - 10])
        assert lag is not None
        # The near form's own error counts in full, though interpolation averages most of it out.
        assert 0.5 * lag < off**2 / movement**2 < 1.15 * lag
        for name, tensor in original["model"].items():
            assert (
                found["model"][name].double() - tensor.double()
            ).abs().max() <= row.error.max_abs


def test_only_the_floating_point_state_is_interpolated(repo: Repo, states: list[State]) -> None:
    repo.gc(now=True, archive=True)
    for state in states:
        found = repo.checkout(state["step"])
        for name in ("frozen", "counts"):
            assert torch.equal(found["model"][name], state["model"][name])
        assert found["step"] == state["step"]
        assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
        for key, moments in found["optimizer"]["state"].items():
            assert torch.equal(moments["step"], state["optimizer"]["state"][key]["step"])
            assert (moments["exp_avg_sq"] > 0).all()
            if 40 <= state["step"] <= 70:  # between anchors that lack them
                assert not moments["exp_avg"].any()


def test_interpolation_is_linear_in_the_step(tmp_path: Path) -> None:
    states = walk(6)
    for state, step in zip(states, (1, 2, 4, 8, 16, 32), strict=True):
        state["step"] = step
    repo = committed(tmp_path, states)
    repo.configure("archive-every", "4")
    assert anchors(repo.gc(now=True, archive=True).archived) == "---A"
    first, last = (repo.checkout(step)["model"]["layer2"].double() for step in (1, 16))
    for step in (2, 4, 8):
        share = (first * (16 - step) + last * (step - 1)) / 15
        assert torch.equal(repo.checkout(step)["model"]["layer2"], share.float())


def test_every_way_to_read_gives_the_same(repo: Repo) -> None:
    repo.gc(now=True, archive=True)
    names = repo.select(["10..HEAD"])
    whole = {name: repo.checkout(name)["model"]["layer1"] for name in names}
    for entry, tensor in repo.series("layer1"):
        assert torch.equal(tensor, whole[entry.id])
    for entry, state in repo.trajectory():
        assert torch.equal(state["model"]["layer1"], whole[entry.id])
    shutil.rmtree(repo.folder / "cache")
    for name in names:
        assert torch.equal(Repo.open(repo.folder.parent).tensor("layer1", name), whole[name])
    assert repo.diff(30, 60).tensors


def test_require_near_refuses_an_archived_commit(repo: Repo, tmp_path: Path) -> None:
    repo.checkout_files(40, tmp_path / "near.pt", require="near")
    repo.gc(now=True, archive=True)
    for require in ("near", "exact"):
        with pytest.raises(ConflictError, match="can only be restored in archived form"):
            repo.checkout_files(40, tmp_path / "out.pt", require=require)
    repo.checkout_files(100, tmp_path / "out.pt", require="exact")


# -- the grace period ------------------------------------------------------------------------------


def test_undo_brings_the_near_form_back(repo: Repo) -> None:
    before = {entry.id: repo.checkout(entry.id) for entry in repo.log()}
    plan = repo.gc(archive=True)
    assert len(plan.replaced) == 6
    assert plan.waiting_bytes > 0
    repo.gc()
    assert forms(repo) == "naaaaaannE"
    assert repo.undo().what == "archive of 6 commits"
    assert forms(repo) == "nnnnnnnnnE"
    for name, state in before.items():
        assert same(repo.checkout(name), state)
    repo.gc(now=True)
    assert not repo.verify().damage
    assert anchors(repo.gc(now=True, archive=True).archived) == "--A--A"
    assert not repo.verify().damage


def test_undo_is_refused_once_the_near_form_is_gone(repo: Repo) -> None:
    repo.gc(now=True, archive=True)
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()


def test_the_near_form_goes_when_the_grace_period_ends(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = repo.gc(archive=True)
    later = (datetime.now(UTC) + timedelta(days=8)).isoformat()
    monkeypatch.setattr("ckptvcs.ops.gc.current_time", lambda: later)
    done = repo.gc()
    assert done.freed_bytes > 0.5 * plan.waiting_bytes
    assert not done.replaced
    assert forms(repo) == "naaaaaannE"
    assert not repo.verify().damage


def test_a_dry_run_says_what_will_be_freed(repo: Repo) -> None:
    names = sorted(str(path) for path in repo.folder.rglob("*.pack"))
    policy = Policy(optimizer_last=2)
    plan = repo.plan_gc(policy, archive=True)
    assert names == sorted(str(path) for path in repo.folder.rglob("*.pack"))
    done = repo.gc(policy, now=True, archive=True)
    assert [row.action for row in plan.decisions] == [row.action for row in done.decisions]
    assert [row.commit for row in plan.archived] == [row.commit for row in done.archived]
    assert plan.archived == done.archived
    assert plan.freed_bytes == pytest.approx(done.freed_bytes, rel=0.05)


# -- records ---------------------------------------------------------------------------------------


def test_dropped_commits_between_anchors(repo: Repo) -> None:
    repo.gc(now=True, archive=True)
    kept = {step: repo.checkout(step) for step in (20, 40, 50, 70)}
    repo.drop(30, 60, now=True)
    assert not repo.verify().damage
    for step, state in kept.items():
        assert same(repo.checkout(step), state)
    repo.drop(40, now=True)  # an anchor: those between still need it
    assert same(repo.checkout(20), kept[20])
    assert same(repo.checkout(50), kept[50])
    assert not repo.verify().damage


def test_nothing_is_deleted_before_the_record(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = handle(repo).catalog
    before = {step: repo.checkout(step) for step in (20, 40)}
    monkeypatch.setattr(
        type(catalog), "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        repo.gc(now=True, archive=True)
    monkeypatch.undo()
    repo = Repo.open(repo.folder.parent)
    assert forms(repo) == "nnnnnnnnnE"
    repo.gc(now=True)
    for step, state in before.items():
        assert same(repo.checkout(step), state)


def test_a_reader_that_is_open_meanwhile(repo: Repo) -> None:
    other = Repo.open(repo.folder.parent)
    other.checkout(40)
    repo.gc(now=True, archive=True)
    assert same(other.checkout(40), repo.checkout(40))


# -- bundle files ----------------------------------------------------------------------------------


def test_archived_commits_travel_in_a_bundle_file(repo: Repo, tmp_path: Path) -> None:
    repo.gc(now=True, archive=True)
    repo.bundle("30..60", tmp_path / "some.ckptz")  # 40 is an anchor, 70 is not in the file
    clone = Repo.clone(tmp_path / "some.ckptz", tmp_path / "clone")
    for step in (30, 40, 50, 60):
        assert same(clone.checkout(step), repo.checkout(step))
        assert clone.show(step).commit.error == repo.show(step).commit.error
        assert clone.show(step).fidelity["model"] == "archived"
    clone.gc(now=True)
    assert not clone.verify().damage


@pytest.fixture
def other(template: Path, tmp_path: Path) -> Repo:
    """A second copy of the repository."""
    shutil.copytree(template, tmp_path / "other")
    return Repo.open(tmp_path / "other")


def test_fetching_archived_commits_does_not_replace_a_better_form(
    repo: Repo, other: Repo, tmp_path: Path
) -> None:
    before = {step: other.checkout(step) for step in (30, 40)}
    repo.gc(now=True, archive=True)
    repo.bundle("10..HEAD", tmp_path / "all.ckptz")
    other.fetch(tmp_path / "all.ckptz")
    assert "a" not in forms(other)
    for step, state in before.items():
        assert same(other.checkout(step), state)
    assert not other.verify().damage


def test_fetch_brings_archived_commits_to_where_they_were_dropped(
    repo: Repo, other: Repo, tmp_path: Path
) -> None:
    other.drop(30, 60, now=True)
    repo.gc(now=True, archive=True)
    repo.bundle("10..HEAD", tmp_path / "all.ckptz")
    other.fetch(tmp_path / "all.ckptz")
    assert same(other.checkout(30), repo.checkout(30))
    assert not other.verify().damage


# -- import ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, states: list[State]) -> Path:
    (tmp_path / "checkpoints").mkdir()
    for state in states:
        torch.save(state, tmp_path / "checkpoints" / f"step{state['step']}.pt")
    return tmp_path / "checkpoints"


def imported(folder: Path, *, delete: bool = False) -> Repo:
    repo = Repo.init(folder.parent / "direct")
    for key, value in SETTINGS.items():
        repo.configure(key, value)
    importer = repo.import_folder(folder)
    importer.look(lambda _: None)
    importer.run_archived(
        delete=delete, accept_near=True, progress=lambda _: None, watch=lambda _: None
    )
    assert not [item.problem for item in importer.items if item.problem]
    return repo


def test_import_archives_from_the_exact_form(repo: Repo, folder: Path, states: list[State]) -> None:
    """The result is closer to the originals than with a detour through near forms."""
    direct = imported(folder)
    repo.gc(now=True, archive=True)
    assert forms(direct) == forms(repo) == "naaaaaannE"
    errors = {True: 0.0, False: 0.0}
    for before, state in pairwise(states[:7]):
        for one in (direct, repo):
            errors[one is direct] += distance(one.checkout(state["step"]), state) ** 2
        error = direct.show(state["step"]).commit.error
        movement = distance(state, before)
        assert error.lag == pytest.approx(
            (distance(direct.checkout(state["step"]), state) / movement) ** 2, rel=0.1
        )
    assert errors[True] < errors[False]
    assert direct.stats().patch_bytes == pytest.approx(repo.stats().patch_bytes, rel=0.01)
    assert not direct.verify().damage


def test_import_leaves_what_was_committed_before(folder: Path, states: list[State]) -> None:
    repo = Repo.init(folder.parent / "direct")
    for key, value in SETTINGS.items():
        repo.configure(key, value)
    importer = repo.import_folder(folder)
    importer.run(lambda _: None, lambda _: None)
    before = {entry.id: repo.checkout(entry.id) for entry in repo.log()}
    assert forms(imported(folder)) == "nnnnnnnnnE"
    for name, state in before.items():
        assert same(repo.checkout(name), state)


def test_import_deletes_originals_once_they_are_archived(folder: Path) -> None:
    direct = imported(folder, delete=True)
    assert not list(folder.iterdir())
    assert forms(direct) == "naaaaaannE"
    assert not direct.verify().damage
