"""Any sequence of commands against a dictionary: what a commit decodes to never changes."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckptvcs.decode.part_reader import PartReader
from ckptvcs.errors import ConflictError, InvalidInputError, NotFoundError
from ckptvcs.gc.retention import Best, Policy
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head, set_ref
from ckptvcs.repo import Repo
from tests.helpers.comparing import same
from tests.helpers.states import adam_state

POLICIES = [
    Policy(last=2),
    Policy(every=3),
    Policy(last=1, every=4),
    Policy(log_spaced=True),
    Policy(best=(Best("loss", "min", 2),)),
    Policy(optimizer_last=2),
    Policy(max_bytes=60_000),
    Policy(within=3600.0, optimizer_last=1),
    Policy(last=1, tagged=True),
]


class Histories(RuleBasedStateMachine):
    """A repository, and for each commit that is not dropped what it must decode to."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.repo = Repo.init(self.folder)
        self.repo.configure("keyframe-depth", "6")
        self.repo.configure("keep-best", "loss:min")
        self.step, self.tagged = 0, 0
        self.now = {"a": torch.randn(40, 30), "b": torch.randn(200), "still": torch.randn(150)}
        self.true: dict[str, Any] = {}
        self.near: dict[
            Any, Any
        ] = {}  # by commit and form: archiving replaces it, undo restores it

    def teardown(self) -> None:
        damage = self.repo.verify().damage
        for name in self._visible():
            self._check(name)
        shutil.rmtree(self.folder)
        assert not damage

    def _visible(self) -> list[str]:
        hidden = handle(self.repo).catalog.dropped().commits
        return [e.id for e in self.repo.log(all_branches=True) if e.id not in hidden]

    def _check(self, name: Any) -> None:
        """A commit is as it was when it was made: near forms bit for bit, exact ones too."""
        entry = self.repo.entry(name)
        if "dropped" in entry.fidelity.values():
            found = handle(self.repo).restorer(name, near=True)
            model = handle(self.repo).catalog.schema(entry.commit.schema).stored("model")
            assert len(list(found.tensors(model))) == len(model)
            return
        near = PartReader(handle(self.repo).restorer(name, near=True)).state()
        assert same(near, self.near[self._form(name)])
        if entry.exact:
            assert same(self.repo.checkout(f"id:{name}"), self.true[name])

    def _form(self, name: Any) -> Any:
        """A commit in the form that it has now."""
        parts = handle(self.repo).catalog.commit(name).parts
        return name, *(state.values for state in parts.values())

    # -- commands ----------------------------------------------------------------------------------

    @rule(
        size=st.sampled_from([1e-3, 1e-2, 1.0]),
        loss=st.floats(0, 9),
        bad=st.booleans(),
        codec=st.sampled_from(["near", "near", "near:step=4", "lossless"]),
    )
    def commit(self, size: float, loss: float, bad: bool, codec: str) -> None:
        self.step += 1
        for name in ("a", "b"):
            self.now[name] = self.now[name] + torch.randn(self.now[name].shape) * size
        state = adam_state(self.now, self.step)
        if bad and self.step % 3 == 0:
            state["model"]["b"][3] = float("nan")
        entry = self.repo.commit(state, step=self.step, metrics={"loss": loss}, codec=codec)
        assert entry.exact
        self.true[entry.id] = state
        self._learn(entry.id)

    def _learn(self, name: Any) -> None:
        """Note what a commit decodes to in its present form."""
        near = PartReader(handle(self.repo).restorer(name, near=True)).state()
        assert same(near, self.near.setdefault(self._form(name), near))

    @precondition(lambda self: self.step > 2)
    @rule(back=st.integers(0, 5))
    def roll_back(self, back: int) -> None:
        try:
            name = self.repo.resolve(f"HEAD~{back}")
        except NotFoundError:
            return
        move_head(handle(self.repo), name, None)
        self.reopen()
        self.step = handle(self.repo).catalog.commit(name).step or 0

    @precondition(lambda self: self.step > 0)
    @rule(back=st.integers(0, 3), pinned=st.booleans())
    def pin(self, back: int, pinned: bool) -> None:
        try:
            self.repo.pin(self.repo.resolve(f"HEAD~{back}"), pinned=pinned)
        except NotFoundError:
            return

    @precondition(lambda self: self.step > 0)
    @rule()
    def tag(self) -> None:
        self.tagged += 1
        set_ref(handle(self.repo), "tags", f"t{self.tagged}", self.repo.resolve("HEAD"), "tag")

    @rule(policy=st.sampled_from([Policy(), *POLICIES]), now=st.booleans(), rekey=st.booleans())
    def gc(self, policy: Policy, now: bool, rekey: bool) -> None:
        try:
            plan = self.repo.plan_gc(policy, now=now)
            done = self.repo.gc(policy, now=now, rekey=rekey)
        except InvalidInputError:
            return
        assert [row.action for row in plan.decisions] == [row.action for row in done.decisions]
        head = handle(self.repo).revisions.head()
        assert head is None or head not in handle(self.repo).catalog.dropped().commits

    @precondition(lambda self: self.step > 2)
    @rule(every=st.integers(2, 4), lag=st.sampled_from(["auto", "1"]), now=st.booleans())
    def archive(self, every: int, lag: str, now: bool) -> None:
        self.repo.configure("archive-every", str(every))
        self.repo.configure("archive-lag", lag)
        for row in self.repo.gc(now=now, archive=True).archived:
            bound = float(lag) if lag != "auto" else 2 * every
            assert (row.error.lag or 0) <= bound
            if "dropped" not in self.repo.entry(row.commit).fidelity.values():
                self._learn(row.commit)

    @precondition(lambda self: self.step > 2)
    @rule(back=st.integers(0, 5), now=st.booleans())
    def drop(self, back: int, now: bool) -> None:
        try:
            name = self.repo.resolve(f"HEAD~{back}")
            self.repo.drop(name, now=now)
        except (NotFoundError, ConflictError):
            return
        assert name in handle(self.repo).catalog.dropped().commits

    @rule()
    def undo(self) -> None:
        try:
            self.repo.undo()
        except (NotFoundError, ConflictError):
            return
        head = handle(self.repo).revisions.head()
        self.step = max(self.step, (head and handle(self.repo).catalog.commit(head).step) or 0)

    @rule()
    def reopen(self) -> None:
        self.repo = Repo.open(self.folder)

    @rule(what=st.sampled_from(["cache", "cache/bases"]))
    def delete_caches(self, what: str) -> None:
        shutil.rmtree(self.repo.folder / what, ignore_errors=True)
        self.reopen()

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def the_newest_are_exact(self) -> None:
        head = handle(self.repo).revisions.head()
        if head is not None:
            entry = self.repo.entry(head)
            if "dropped" not in entry.fidelity.values():
                self._check(head)

    @invariant()
    def depths_are_bounded(self) -> None:
        for name in self._visible():
            assert handle(self.repo).catalog.commit(name).depth <= 6

    @invariant()
    def the_past_can_be_read(self) -> None:
        if self.true:
            assert self.repo.reflog("main")


TestHistories = Histories.TestCase
