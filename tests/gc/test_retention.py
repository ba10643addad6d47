"""What is kept exactly, what fades, what is dropped, and how it is taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptvcs.decode.chain import ChainReader
from ckptvcs.errors import BusyError, ConflictError, InvalidInputError, NotFoundError
from ckptvcs.gc.retention import Best, Policy
from ckptvcs.history.log import LogEntry
from ckptvcs.ops.checkout import save_part
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head, set_ref
from ckptvcs.repo import Repo
from ckptvcs.store import leases
from ckptvcs.store.leases import exclusive
from tests.helpers.comparing import same
from tests.helpers.profiles import short
from tests.helpers.states import adam_state, moved, weights

pytestmark = pytest.mark.any_backend


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo.init(tmp_path)


class Run:
    """A run that is committed, and what was committed."""

    def __init__(self, repo: Repo) -> None:
        self.repo, self.now, self.step = repo, weights(), 0
        self.states: dict[int, Any] = {}

    def commit(self, count: int = 1, **options: Any) -> LogEntry:
        for _ in range(count):
            self.step += 1
            state = adam_state(self.now, self.step)
            self.states[self.step] = {
                "model": {name: w.clone() for name, w in state["model"].items()},
                **{key: value for key, value in state.items() if key != "model"},
            }
            entry = self.repo.commit(state, step=self.step, **options)
            self.now = moved(self.now)
        return entry

    def exact(self) -> list[int | None]:
        """The steps that the log calls exact, each proven."""
        for entry in self.repo.log():
            assert entry.step is not None
            assert same(self.states[entry.step], self.repo.checkout(entry.step)) == entry.exact
        return [entry.step for entry in self.repo.log() if entry.exact]


@pytest.fixture
def run(repo: Repo) -> Run:
    return Run(repo)


def sizes(repo: Repo) -> int:
    return sum(path.stat().st_size for path in repo.folder.glob("packs/*/*.pack"))


# -- exact forms -------------------------------------------------------------------------------


def test_the_newest_two_are_exact(run: Run, repo: Repo) -> None:
    for step in range(1, 6):
        entry = run.commit()
        assert entry.exact
        assert entry.commit.patch_bytes > entry.stored_bytes
        assert run.exact() == [step, step - 1][:step]
    assert not repo.verify().damage
    again = Run(Repo.open(repo.folder))
    again.states = run.states
    assert again.exact() == [5, 4]


@pytest.mark.parametrize("newest", [0, 1, 3])
def test_how_many_is_a_setting(newest: int, run: Run, repo: Repo) -> None:
    repo.configure("keep-exact", str(newest))
    run.commit(5)
    assert run.exact() == [5, 4, 3][:newest]


def test_tags_pins_and_the_best_stay_exact(run: Run, repo: Repo) -> None:
    repo.configure("keep-best", "loss:min")
    run.commit(metrics={"loss": 1.0})
    set_ref(handle(repo), "tags", "v1", repo.resolve(1), "tag")
    run.commit(metrics={"loss": 0.1})
    run.commit(metrics={"loss": 0.5})
    assert repo.pin(repo.resolve(3), pinned=True)
    assert not repo.pin(repo.resolve(3), pinned=True)
    run.commit(3, metrics={"loss": 0.7})
    assert run.exact() == [6, 5, 3, 2, 1]
    set_ref(handle(repo), "tags", "v1", None, "delete")
    assert repo.pin(repo.resolve(3), pinned=False)
    run.commit(metrics={"loss": 0.05})
    assert run.exact() == [7, 6]
    assert not repo.verify().damage


def test_weights_alone_may_stay_exact(run: Run, repo: Repo) -> None:
    repo.configure("pin-fidelity", "weights")
    run.commit(2)
    repo.pin(repo.resolve(1), pinned=True)
    run.commit(2)
    (entry,) = (entry for entry in repo.log() if entry.step == 1)
    assert entry.fidelity["model"] == "exact"
    assert entry.fidelity["optimizer"] == "near"
    back = repo.checkout(1)
    assert same(back["model"], run.states[1]["model"])
    assert not same(back, run.states[1])


def test_values_that_are_not_finite_fade_nothing(run: Run) -> None:
    run.commit(2)
    run.now["layer1"][3, 4] = float("nan")
    run.commit()
    assert run.exact() == [3, 2, 1]
    run.commit()  # no more of them than before
    assert run.exact() == [4, 3]


def test_the_exact_form_comes_back_with_its_content(run: Run, repo: Repo) -> None:
    run.commit(3)
    first = repo.resolve(1)
    move_head(handle(repo), first, None)
    entry = repo.commit(run.states[1], step=1)
    assert entry.exact
    assert same(repo.checkout(entry.id), run.states[1])


def test_patches_on_the_same_near_values_are_told_apart(run: Run, repo: Repo) -> None:
    run.commit(codec="excp-max")  # which keeps nothing of so small a step: all near forms are one
    for _ in range(3):
        state = run.states[run.step]
        run.now = {name: w + 1e-7 for name, w in state["model"].items()}
        run.commit(codec="excp-max")
    assert len({entry.commit.parts["model"].values for entry in repo.log(3)}) == 1
    assert run.exact() == [4, 3, 1]  # the first is a lossless keyframe
    bundles = [
        handle(repo).catalog.recipe(state.exact).bundles
        for entry in repo.log(2)
        for state in entry.commit.parts.values()
        if state.exact
    ]
    assert len(set(bundles)) == len(bundles) > 1
    assert not repo.verify().damage


def test_unchanged_content_is_stored_once_and_fades_together(run: Run, repo: Repo) -> None:
    run.commit()
    before = sizes(repo)
    repo.commit(run.states[1], step=1)
    repo.commit(run.states[1], step=1)
    assert sizes(repo) == before
    assert all(entry.exact for entry in repo.log())  # the newest two are the first too
    run.commit(2)
    assert [entry.exact for entry in repo.log()] == [True, True, False, False, False]
    assert not repo.verify().damage


def test_patches_of_other_branches_fade_with_gc(run: Run, repo: Repo) -> None:
    run.commit(3)
    for _ in range(3):  # a rollback each
        move_head(handle(repo), repo.resolve(1), None)
        run.step = 1
        run.commit()
    assert len(handle(repo).fader().patches()) > 4
    repo.gc()
    last = repo.log(revision="main-4")
    assert last[0].exact
    assert all(entry.exact for entry in repo.log(2, revision="main"))  # which HEAD followed
    parts = [patch.part for patch in handle(repo).fader().patches()]
    assert parts.count("model") == 3
    assert parts.count("optimizer") == 2  # those of two commits are equal
    assert not repo.verify().damage


@pytest.mark.directory_only
def test_a_patch_that_is_missing_without_a_record_is_damage(run: Run, repo: Repo) -> None:
    run.commit(2)
    patch = handle(repo).fader().patches()[0]
    (repo.folder / patch.folder / patch.pack[:2] / f"{patch.pack}.pack").unlink()
    again = Repo.open(repo.folder)
    handle(again).catalog.store.refresh()
    assert [damage.what for damage in again.verify().damage] == ["patch"]
    assert not all(entry.exact for entry in again.log())


def test_a_commit_with_a_patch_is_as_fresh_as_one_without(run: Run, repo: Repo) -> None:
    run.commit(3)
    other = Run(Repo.init(repo.folder.parent / "other"))
    other.repo.configure("keep-exact", "0")
    other.commit(3)
    for one, two in zip(repo.log(), other.repo.log(), strict=True):
        assert one.commit.parts["model"].values == two.commit.parts["model"].values
        assert one.stored_bytes == pytest.approx(two.stored_bytes, rel=0.05)


def test_a_reader_whose_patch_fades_gets_the_near_form(run: Run, repo: Repo) -> None:
    run.commit(2)
    old = Repo.open(repo.folder)
    assert same(old.checkout(1), run.states[1])
    run.commit(2)  # by another process, for all that the reader knows
    near = old.checkout(1)
    assert not same(near, run.states[1])
    assert same(near, repo.checkout(1))


# -- dropping ----------------------------------------------------------------------------------


def test_dropped_commits_are_gone_and_others_are_as_they_were(run: Run, repo: Repo) -> None:
    run.commit(9)
    true = {step: repo.checkout(step) for step in range(1, 10)}
    plan = repo.gc(Policy(every=4), now=True)
    assert {row.commit.step: row.action for row in plan.decisions} == {
        step: "keep" if step in (4, 8, 9) else "drop" for step in range(1, 10)
    }
    assert [entry.step for entry in repo.log()] == [9, 8, 4]
    assert len(repo.log(all_branches=True)) == 9
    for step in (4, 8, 9):
        assert same(repo.checkout(step), true[step])
    with pytest.raises(NotFoundError, match="was dropped"):
        repo.resolve(5)
    dropped = next(entry for entry in repo.log(all_branches=True) if entry.step == 5)
    assert set(dropped.fidelity.values()) == {"dropped"}
    with pytest.raises(NotFoundError, match="dropped"):
        repo.checkout(dropped.id)
    assert not repo.verify().damage
    assert repo.resolve("HEAD~2") == repo.resolve(4)


@pytest.mark.directory_only
def test_moments_of_dropped_commits_are_freed_at_once(run: Run, repo: Repo) -> None:
    run.commit(9)
    plan = repo.plan_gc(Policy(last=1), now=True)
    before = sizes(repo)
    done = repo.gc(Policy(last=1), now=True)
    assert abs(done.freed_bytes - plan.freed_bytes) < 20  # the record has another time in it
    assert sizes(repo) < before
    row = next(row for row in done.decisions if row.commit.step == 5)
    assert row.freed_bytes > 0
    assert row.chained_bytes > 0  # step 9 stands on its weights


def test_parts_can_be_dropped_alone(run: Run, repo: Repo) -> None:
    run.commit(6)
    repo.gc(Policy(optimizer_last=2), now=True)
    assert [entry.fidelity["optimizer"] for entry in repo.log()] == [
        "exact",
        "exact",
        *["dropped"] * 4,
    ]
    with pytest.raises(NotFoundError, match="optimizer"):
        repo.checkout(2)
    save_part(handle(repo), repo.resolve(2), "model", repo.root / "two.pt")
    assert (repo.root / "two.pt").exists()
    assert not repo.verify().damage
    assert run.commit(2).exact


def test_what_is_protected_stays(run: Run, repo: Repo) -> None:
    repo.configure("keep-best", "loss:min")
    for loss in (3.0, 1.0, 2.0, 2.5, 2.6):
        run.commit(metrics={"loss": loss})
    set_ref(handle(repo), "tags", "v1", repo.resolve(1), "tag")
    repo.pin(repo.resolve(3), pinned=True)
    repo.gc(Policy(every=1000, last=1), now=True)
    assert [entry.step for entry in repo.log()] == [5, 3, 2, 1]


def test_rules_that_keep_nothing_are_refused(run: Run, repo: Repo) -> None:
    run.commit(3)
    with pytest.raises(InvalidInputError, match="keep no commit"):
        repo.gc(Policy(every=1000), now=True)
    assert len(repo.log()) == 3
    repo.gc()  # without rules it only sweeps
    assert len(repo.log()) == 3


def test_a_drop_is_undone_until_it_is_swept(run: Run, repo: Repo) -> None:
    run.commit(5)
    true = {step: repo.checkout(step) for step in range(1, 6)}
    repo.gc(Policy(last=1), sweep=False)
    assert [entry.step for entry in repo.log()] == [5]
    assert "drop" in repo.undo().what
    assert [entry.step for entry in repo.log()] == [5, 4, 3, 2, 1]
    for step, state in true.items():
        assert same(repo.checkout(step), state)
    repo.gc(Policy(last=1), now=True)
    with pytest.raises(ConflictError, match="gc deleted"):
        repo.undo()
    assert not repo.verify().damage


def test_moves_are_undone_one_after_another(run: Run, repo: Repo) -> None:
    run.commit(4)
    for step in (3, 2):
        repo.undo()
        assert repo.log()[0].step == step
    run.step = 2
    run.commit()
    assert [entry.step for entry in repo.log()] == [3, 2, 1]
    repo.undo()
    assert repo.log()[0].step == 2
    repo.undo()
    with pytest.raises(NotFoundError, match="nothing to undo"):
        repo.undo()
    actions = [event.action for event in repo.reflog()]
    assert actions.count("commit") == 5
    assert len(actions) >= 9
    repo.gc()
    assert not repo.verify().damage
    assert sum(not event.available for event in repo.reflog()) > 0


@pytest.mark.directory_only
def test_tiny_packs_are_merged_and_parts_stay_apart(run: Run, repo: Repo) -> None:
    run.commit(12)
    true = {step: repo.checkout(step) for step in range(1, 13)}
    before = len(list(repo.folder.glob("*/*/*.pack")))
    alone = {entry.step: entry.stored_bytes for entry in repo.log()}
    repo.gc()
    after = len(list(repo.folder.glob("*/*/*.pack")))
    assert after < before / 3
    for entry in repo.log():
        assert entry.stored_bytes == pytest.approx(alone[entry.step], rel=0.2)
    for step, state in true.items():
        assert same(repo.checkout(step), state)
    repo.gc(Policy(optimizer_last=1), now=True)
    assert not repo.verify().damage
    repo.gc(Policy(last=3), now=True)
    run.commit(2)
    assert not repo.verify().damage


# -- what others stand on ----------------------------------------------------------------------


def test_a_table_that_a_patch_holds_too_is_not_lost_with_it(run: Run, repo: Repo) -> None:
    repo.configure("keep-exact", "1")
    state = adam_state(run.now, 2)
    repo.commit(state, step=2)
    repo.commit(state | {"note": "final"}, step=3, codec="lossless")
    assert not repo.verify().damage
    assert same(repo.checkout(3), state | {"note": "final"})
    for _ in range(4):  # until tiny packs are merged
        run.now = moved(run.now)
        run.step = max(run.step, 3)
        run.commit()
        repo.gc()
    assert not Repo.open(repo.folder).verify().damage


@pytest.mark.parametrize("codec", ["near", "lossless", "excp"])
def test_a_rollback_to_a_commit_without_its_optimizer(codec: str, run: Run, repo: Repo) -> None:
    run.commit(5, codec=codec)
    repo.gc(Policy(optimizer_last=1), now=True)
    run.step = 2
    assert run.commit(codec=codec).exact  # on step 2, whose optimizer is gone
    move_head(handle(repo), repo.resolve(1), None)
    again = Repo.open(repo.folder)
    entry = again.commit(run.states[1], step=1, codec=codec)
    assert same(again.checkout(entry.id), run.states[1])
    assert not again.verify().damage
    again.gc()


def test_nothing_leads_to_what_was_swept(run: Run, repo: Repo) -> None:
    run.commit(3)
    last = repo.resolve(3)
    repo.undo()
    repo.gc()
    assert [event.available for event in repo.reflog() if event.commit == last] == [False]
    for act in (
        lambda: set_ref(handle(repo), "heads", "rescue", last, "branch"),
        lambda: set_ref(handle(repo), "tags", "v1", last, "tag"),
        lambda: repo.pin(last, pinned=True),
        lambda: move_head(handle(repo), last, None),
    ):
        with pytest.raises(NotFoundError, match=r"deleted by gc|not in the store"):
            act()
    repo.gc(Policy(last=1), now=True)
    with pytest.raises(NotFoundError):
        set_ref(
            handle(repo),
            "tags",
            "v2",
            next(entry.id for entry in repo.log(all_branches=True) if not entry.exact),
            "tag",
        )
    assert not repo.verify().damage
    repo.gc()


def test_refs_wait_for_a_sweep(run: Run, repo: Repo) -> None:
    run.commit(2)
    with exclusive(handle(repo).catalog.store.backend):
        for act in (
            repo.undo,
            lambda: repo.pin(repo.resolve(1), pinned=True),
            lambda: set_ref(handle(repo), "tags", "v1", repo.resolve(1), "tag"),
        ):
            with leases.patience(0), pytest.raises(BusyError):
                act()


def test_the_best_is_one_that_is_in_the_history(run: Run, repo: Repo) -> None:
    repo.configure("keep-best", "loss:min")
    for loss in (1.0, 0.5, 0.1):
        run.commit(metrics={"loss": loss})
    repo.undo()  # the best one is taken back
    run.commit(3, metrics={"loss": 0.9})
    assert [entry.step for entry in repo.log() if entry.exact] == [6, 5, 2]


def test_rules_see_what_only_a_tag_leads_to(run: Run, repo: Repo) -> None:
    run.commit(2)
    set_ref(handle(repo), "heads", "x", repo.resolve(2), "branch")
    move_head(handle(repo), repo.resolve(2), "x")
    run.repo = Repo.open(repo.folder)
    run.commit(3)
    set_ref(handle(repo), "tags", "v1", run.repo.resolve("x"), "tag")
    move_head(handle(repo), repo.resolve("main"), "main")
    set_ref(handle(repo), "heads", "x", None, "delete")
    actions = {row.commit.step: row.action for row in repo.plan_gc(Policy(every=1)).decisions}
    assert actions == dict.fromkeys(range(1, 6), "keep")


@pytest.mark.parametrize("codec", ["near", "near:step=4"])
def test_two_optimizers_of_one_model(codec: str, run: Run, repo: Repo) -> None:
    for step in range(1, 4):
        state = adam_state(run.now, step)
        state["second"] = adam_state(run.now, step + 50)["optimizer"]
        repo.commit(state, step=step, codec=codec)
        run.now = moved(run.now)
    assert same(repo.checkout(3), state)
    assert not repo.verify().damage


# -- rekeying ----------------------------------------------------------------------------------


def depths(repo: Repo) -> dict[int | None, int]:
    """How many frames lie below any frame of a commit, as it is stored now."""
    reader = ChainReader(handle(repo).catalog)
    return {
        entry.step: max(
            len(reader.links(state.values, position, schema.tensors[number])) - 1
            for schema in [handle(repo).catalog.schema(entry.commit.schema)]
            for part, state in entry.commit.parts.items()
            for position, number in enumerate(schema.stored(part))
        )
        for entry in repo.log()
    }


@pytest.mark.directory_only
@pytest.mark.parametrize("codec", short(["near", "lossless", "excp"], ["near", "lossless"]))
def test_rekeying_merges_deltas_and_changes_no_value(codec: str, run: Run, repo: Repo) -> None:
    repo.configure("keep-exact", "0")
    run.commit(13, codec=codec)
    true = {step: repo.checkout(step) for step in range(1, 14)}
    repo.gc(Policy(every=6, last=1), now=True)
    before = sizes(repo)
    repo.gc(rekey=True)
    # What is on no grid has to be coded losslessly; deltas of small are, compared to keyframes.
    assert sizes(repo) < {"excp": 1}.get(codec, 0.8) * before
    fresh = Repo.open(repo.folder)
    assert max(depths(fresh).values()) <= 2
    for step in (6, 12, 13):
        assert same(fresh.checkout(step), true[step])
    assert not fresh.verify().damage
    after = sizes(repo)
    repo.gc(rekey=True)  # there is nothing left to do
    assert sizes(repo) == after
    fresh.configure("keep-exact", "2")
    run.repo = fresh
    run.commit(2, codec=codec)
    fresh.gc(Policy(last=2), rekey=True, now=True)
    assert not fresh.verify().damage
    assert same(fresh.checkout(15), run.states[15])


def test_rekeying_bounds_the_depth(run: Run, repo: Repo) -> None:
    run.commit(12)
    true = {step: repo.checkout(step) for step in range(1, 13)}
    assert max(depths(repo).values()) == 11
    repo.configure("keyframe-depth", "3")
    repo.gc(rekey=True)
    assert max(depths(repo).values()) == 3
    for step, state in true.items():
        assert same(repo.checkout(step), state)
    assert not repo.verify().damage


@pytest.mark.directory_only
def test_what_never_moved_is_stored_once_after_rekeying(run: Run, repo: Repo) -> None:
    repo.configure("keep-exact", "0")
    frozen = torch.randn(50_000)
    for step in range(1, 9):
        state = adam_state(run.now, step)
        state["model"]["frozen"] = frozen
        repo.commit(state, step=step)
        run.now = moved(run.now)
    repo.gc(Policy(every=3, last=1), now=True)
    before = sizes(repo)
    repo.gc(rekey=True)
    assert sizes(repo) < before
    frames = {
        handle(repo)
        .catalog.recipe(entry.commit.parts["model"].values)
        .place(
            [t.name for t in handle(repo).catalog.schema(entry.commit.schema).tensors].index(
                "model.frozen"
            )
        )
        for entry in repo.log()
    }
    assert len(frames) == 1
    assert not repo.verify().damage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_merge_too(dtype: torch.dtype, repo: Repo) -> None:
    now, true = weights(dtype), {}
    for step in range(1, 9):
        repo.commit({"model": now, "step": step}, step=step)
        now = moved(now)
    true = {step: repo.checkout(step) for step in range(1, 9)}
    repo.gc(Policy(last=1, every=4), rekey=True, now=True)
    for step in (4, 8):
        assert same(repo.checkout(step), true[step])
    assert not repo.verify().damage


# -- rules -------------------------------------------------------------------------------------


def test_best_rules() -> None:
    assert Best.parse("val:loss:min:3") == Best("val:loss", "min", 3)
    for text in ("", "loss", "loss:low", "loss:min:0", ":min", "loss:min:-1"):
        with pytest.raises(InvalidInputError):
            Best.parse(text)


@pytest.mark.directory_only
@pytest.mark.parametrize("part", [None, "model"])
def test_exact_is_exact_at_the_moment_of_the_checkout(
    part: str | None, run: Run, repo: Repo, tmp_path: Path
) -> None:
    """A patch is lost, or fades, after the look: the second one finds the near form alone."""
    run.commit(3)
    name = repo.resolve("HEAD")
    assert repo.entry(name).exact
    for patch in handle(repo).fader().patches():
        (repo.folder / patch.folder / patch.pack[:2] / f"{patch.pack}.pack").unlink(missing_ok=True)
    target = tmp_path / "out.pt"

    def write() -> object:
        if part is None:
            return repo.checkout_files(name, target, exact=True)
        return repo.checkout_part(name, part, target, exact=True)

    with pytest.raises(ConflictError, match="near form"):
        write()
    assert not target.exists()
    assert not repo.checkout_files(name, target).exact
