"""What may be cut, and what must hold of the repository then."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import NotFoundError
from ckptvcs.gc.retention import Policy
from ckptvcs.history.provenance import CodeState, Provenance
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.ops.refs import move_head, set_ref
from ckptvcs.ops.request import Request
from ckptvcs.repo import Repo
from ckptvcs.store.ids import ObjectId
from tests.helpers.soaking import run_states

Act = Callable[[Path], object]


def states(count: int) -> list[dict[str, Any]]:
    """States of a very small run, with the moments of AdamW."""
    return [copy.deepcopy(state) for state in islice(run_states(0, (40, 30)), count)]


def save(folder: Path, steps: range) -> None:
    """Write checkpoints of some steps."""
    folder.mkdir(exist_ok=True)
    for state in states(steps.stop - 1)[steps.start - 1 :]:
        torch.save(state, folder / f"step-{state['step']}.pt")


@dataclass(frozen=True)
class Scenario:
    """A history of `commits` near ones is prepared, and then there is an `act` on it.

    `repeats`: it can be done again once it is done, and leaves the same.  `also` must hold after a
    cut, whatever happens to the history.
    """

    name: str
    act: Act
    commits: int = 3
    prepare: Act | None = None
    repeats: bool = True
    also: Act = lambda _: None

    def build(self, root: Path) -> None:
        """Make the repository in `root`/repo, and files to commit beside it."""
        save(root, range(1, self.commits + 3))
        (root / "repo").mkdir()
        if self.commits:
            repo = Repo.init(root / "repo")
            repo.configure("keyframe-depth", "4")
            for step in range(1, self.commits + 1):
                repo.commit_path(root / f"step-{step}.pt", message="", metrics={"loss": 1 / step})
            set_ref(handle(repo), "tags", "first", repo.resolve(1), "tag")
        if self.prepare is not None:
            self.prepare(root)


def _commit(codec: str) -> Act:
    def act(root: Path) -> None:
        repo = Repo.open(root / "repo")
        steps = [entry.step or 0 for entry in repo.log(1)]
        path = root / f"step-{min(4, steps[0] + 1)}.pt"
        repo.commit_path(path, message="next", codec=codec)

    return act


_ORIGIN = Provenance("/run", "3.11", "Linux", {"torch": "2"}, code=CodeState("ab" * 20, None, True))


def _commit_described(root: Path) -> None:
    request = Request(step=4, checkpoint=state_checkpoint(states(4)[-1]), origin=_ORIGIN)
    commit_checkpoint(handle(Repo.open(root / "repo")), request)


def _origin_is_whole(root: Path) -> None:
    repo = Repo.open(root / "repo")
    for entry in repo.log():
        assert repo.provenance(entry.id) in ((None, _ORIGIN) if entry.step == 4 else (None,))


def _commit_together(root: Path) -> None:
    """As two processes do, each of which has one of the weights."""
    repo = Repo.open(root / "repo")
    steps = [entry.step or 0 for entry in repo.log(1)]
    step = min(4, steps[0] + 1)
    whole = states(step)[-1]
    with DistributedCommit(handle(repo), Request("next", step, path="together")) as commit:
        plan, shards = commit.begin(), {}
        for number, name in enumerate("ab"):
            moments = {number: whole["optimizer"]["state"][number]}
            part = {
                "model": {name: whole["model"][name]},
                "optimizer": {**whole["optimizer"], "state": moments},
            }
            checkpoint = state_checkpoint(part)
            shards[f"rank-{number}.pt"] = encode_share(
                handle(Repo.open(root / "repo")), plan, checkpoint
            )
        commit.finish(shards, {"notes.json": b"{}"})


def _gc(policy: Policy, *, now: bool = True, rekey: bool = False) -> Act:
    return lambda root: Repo.open(root / "repo").gc(policy, now=now, rekey=rekey)


def _archived(root: Path) -> None:
    repo = Repo.open(root / "repo")
    for key, value in {"archive-every": "2", "keep-exact": "1"}.items():
        repo.configure(key, value)


def _archive(*, now: bool) -> Act:
    return lambda root: Repo.open(root / "repo").gc(now=now, archive=True)


def _archived_and_waiting(root: Path) -> None:
    _archived(root)
    _archive(now=False)(root)


def _import_archived(root: Path) -> None:
    importer = _importer(root)
    if importer is not None:
        importer.run_archived(
            delete=True, accept_near=True, progress=lambda _: None, watch=lambda _: None
        )


def _found_to_archive(root: Path) -> None:
    _archived(root)
    _found_more(root)


def _drop(*steps: int, now: bool) -> Act:
    return lambda root: Repo.open(root / "repo").drop(*steps, now=now)


def _undo(root: Path) -> None:
    Repo.open(root / "repo").undo()


def _found(root: Path) -> None:
    save(root / "found", range(4, 6))


def _importer(root: Path) -> Importer | None:
    repo = Repo.open(root / "repo")
    try:
        importer = Importer(handle(repo), root / "found")
    except NotFoundError:  # all of it has been imported, and removed
        return None
    importer.look(lambda _: None)
    return importer


def _import(root: Path) -> None:
    importer = _importer(root)
    if importer is not None:
        importer.run(lambda _: None, lambda _: None)
        importer.remove(accept_near=False, progress=lambda _: None, watch=lambda _: None)


def _found_more(root: Path) -> None:
    save(root / "found", range(4, 8))


def _import_one_by_one(*, accept_near: bool) -> Act:
    def act(root: Path) -> None:
        importer = _importer(root)
        if importer is not None:
            importer.run_and_remove(
                accept_near=accept_near, progress=lambda _: None, watch=lambda _: None
            )

    return act


def _originals_are_somewhere(*steps: int, near: bool = False) -> Act:
    """Each original is there, or a commit of it that is exact, or with `near` any."""

    def check(root: Path) -> None:
        repo = Repo.open(root / "repo")
        kept = {entry.step for entry in repo.log() if near or entry.exact}
        for step in steps:
            assert step in kept or (root / "found" / f"step-{step}.pt").exists()

    return check


def _bundled(root: Path) -> None:
    """A file with the steps 2 to 5, of which the repository dropped one and lacks two."""
    shutil.copytree(root / "repo", root / "source")
    source = Repo.open(root / "source")
    for step in (4, 5):
        source.commit_path(root / f"step-{step}.pt", message="more")
    source.bundle("2..5", root / "some.ckptz")
    Repo.open(root / "repo").gc(Policy(last=1), now=True)


def _fetch(root: Path) -> None:
    Repo.open(root / "repo").fetch(root / "some.ckptz")


def _branch(root: Path) -> None:
    repo = Repo.open(root / "repo")
    move_head(handle(repo), repo.resolve(2), None)
    repo.commit_path(root / "step-3.pt", message="again")


def _refs(root: Path) -> None:
    repo = Repo.open(root / "repo")
    set_ref(handle(repo), "tags", "v1", repo.resolve(2), "tag")
    repo.pin(repo.resolve(2), pinned=True)
    repo.configure("keep-exact", "1")


def _side(root: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.commit_path(root / "step-4.pt", message="side", branch="side")
    set_ref(handle(repo), "heads", "side", None, "delete")


def _note(root: Path) -> None:
    Repo.open(root / "repo").note(2, message="late", metrics={"eval": 0.25, "loss": 0.5})


def _note_is_whole(root: Path) -> None:
    entry = Repo.open(root / "repo").show(2)
    old, new = ("", {"loss": 0.5}), ("late", {"eval": 0.25, "loss": 0.5})
    assert (entry.message, entry.metrics) in (old, new)


def _each(root: Path) -> None:
    run = Repo.open(root / "repo").each
    run(lambda entry, path: {"bytes": path.stat().st_size}, metrics=["bytes"])


def _metrics_are_right(root: Path) -> None:
    for entry in Repo.open(root / "repo").log():
        assert entry.metrics.get("bytes") in (None, entry.commit.raw_bytes)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("init", lambda root: Repo.init(root / "repo"), commits=0),
        Scenario("commit", _commit("near"), repeats=False),
        Scenario("commit exactly", _commit("lossless"), repeats=False),
        Scenario("commit excp", _commit("excp"), repeats=False),
        Scenario("commit with its origin", _commit_described, repeats=False, also=_origin_is_whole),
        Scenario("commit together", _commit_together, repeats=False),
        Scenario("branch", _branch, repeats=False),
        Scenario("refs", _refs),
        Scenario("note", _note, also=_note_is_whole),
        Scenario("each", _each, also=_metrics_are_right),
        Scenario("gc", _gc(Policy(last=2)), commits=5),
        Scenario("gc with grace", _gc(Policy(last=2), now=False), commits=5),
        Scenario("gc of parts", _gc(Policy(optimizer_last=1)), commits=4),
        Scenario("gc of a branch", _gc(Policy()), prepare=_side),
        Scenario("rekey", _gc(Policy(every=3), rekey=True), commits=7),
        Scenario("archive now", _archive(now=True), commits=6, prepare=_archived),
        Scenario("archive with grace", _archive(now=False), commits=6, prepare=_archived),
        Scenario("undo an archive", _undo, commits=6, prepare=_archived_and_waiting, repeats=False),
        Scenario(
            "import archived",
            _import_archived,
            prepare=_found_to_archive,
            also=_originals_are_somewhere(4, 5, 6, 7, near=True),
        ),
        Scenario("drop", _drop(2, 3, now=False), commits=5, repeats=False),
        Scenario("drop now", _drop(2, 3, now=True), commits=5, repeats=False),
        Scenario("drop the newest", _drop(2, 3, now=False), commits=3, repeats=False),
        Scenario("repack", _gc(Policy()), commits=9),
        Scenario("undo a commit", _undo, repeats=False),
        Scenario(
            "undo a drop", _undo, commits=5, prepare=_gc(Policy(last=1), now=False), repeats=False
        ),
        Scenario(
            "undo a drop of the newest",
            _undo,
            commits=3,
            prepare=_drop(2, 3, now=False),
            repeats=False,
        ),
        Scenario("fetch", _fetch, prepare=_bundled),
        Scenario("import", _import, prepare=_found, also=_originals_are_somewhere(4, 5)),
        Scenario(
            "import one by one",
            _import_one_by_one(accept_near=False),
            prepare=_found_more,
            also=_originals_are_somewhere(4, 5, 6, 7),
        ),
        Scenario(
            "import near one by one",
            _import_one_by_one(accept_near=True),
            prepare=_found_more,
            also=_originals_are_somewhere(4, 5, 6, 7, near=True),
        ),
    )
}


def refs(repo: Repo) -> dict[str, ObjectId]:
    """What refs are at; pins by the step of their commit, whose id is another one each time."""
    return {
        f"pins/{handle(repo).catalog.commit(name).step}" if ref.startswith("pins/") else ref: name
        for ref, name in handle(repo).revisions.tips().items()
    }


@dataclass(frozen=True)
class Snapshot:
    """The visible commits of a repository: the hash of what each gives, in its near form and, where
    there is one, in its exact form.
    """

    near: dict[ObjectId, str]
    exact: dict[ObjectId, str]
    refs: dict[str, ObjectId]

    @classmethod
    def of(cls, root: Path) -> Snapshot:
        """Look at a repository; nothing where there is none."""
        try:
            repo = Repo.open(root / "repo")
        except NotFoundError:
            return cls({}, {}, {})
        near, exact = {}, {}
        for name in handle(repo).revisions.visible():
            entry = repo.entry(name)
            if "dropped" in entry.fidelity.values():
                model = handle(repo).catalog.schema(entry.commit.schema).stored("model")
                read = dict(handle(repo).restorer(name, near=True).tensors(model))
                near[name] = str(len(read))
                continue
            near[name] = _digest(handle(repo).restorer(name, near=True))
            if entry.exact:
                exact[name] = _digest(handle(repo).restorer(name))
        return cls(near, exact, refs(repo))


def _digest(restorer: Restorer) -> str:
    return " ".join(map(restorer.digest, restorer.commit.files))


@dataclass(frozen=True)
class Expected:
    """What an act does when nothing cuts it."""

    before: Snapshot
    after: Snapshot

    def check(self, scenario: Scenario, root: Path) -> None:
        """Everything that must hold of a repository whose act was cut."""
        found = Snapshot.of(root)
        self._check_old(found)
        scenario.also(root)
        assert set(found.refs) <= set(self.before.refs) | set(self.after.refs)
        for ref, name in self.before.refs.items():
            now = found.refs.get(ref)
            moved = self.after.refs.get(ref) != name
            assert now == name or moved, f"{ref} moved"
        if scenario.repeats or not self._is_done(found):
            scenario.act(root)  # a second try works
        repo = Repo.open(root / "repo")
        assert set(refs(repo)) == set(self.after.refs)
        left = set(handle(repo).revisions.visible())
        assert left >= set(self.before.near) & set(self.after.near)
        assert len(left) == len(self.after.near)
        for name in set(self.before.exact) & set(self.after.exact):
            assert repo.entry(name).exact, "an exact form is gone"
        repo.gc()
        for folder in ("tmp", "leases", "marks"):
            assert not list((repo.folder / folder).glob("*")), f"debris in {folder}"
        damage = repo.verify().damage
        assert not damage, damage

    def _is_done(self, found: Snapshot) -> bool:
        """Whether the refs that move have moved, and what is dropped is dropped."""
        moved = [
            {ref for ref, name in one.refs.items() if name != self.before.refs.get(ref)}
            for one in (found, self.after)
        ]
        return moved[0] == moved[1] and len(found.near) == len(self.after.near)

    def _check_old(self, found: Snapshot) -> None:
        """Old commits go only where the act drops them; what is there is what it was."""
        for name, digest in self.before.near.items():
            if name in self.after.near:
                assert name in found.near, "a commit is gone"
            if name in found.near:
                # Its moments may have been let go.
                assert found.near[name] in (digest, self.after.near.get(name))
            if name in self.after.exact:
                assert name in found.exact, "an exact form is gone"
            if name in found.exact:
                assert found.exact[name] == self.before.exact.get(name, self.after.exact.get(name))


def expected(scenario: Scenario, template: Path, scratch: Path) -> Expected:
    """Run an act on a copy of `template`."""
    shutil.copytree(template, scratch)
    before = Snapshot.of(scratch)
    scenario.act(scratch)
    return Expected(before, Snapshot.of(scratch))


class Cut:
    """A prepared history, and what its act does when nothing cuts it."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self._folder, self._count = scenario, folder, 0
        self.template = folder / "template"
        self.template.mkdir()
        scenario.build(self.template)
        self.expected: Expected = expected(scenario, self.template, folder / "calm")

    def copy(self) -> Path:
        """A fresh copy of the history."""
        self._count += 1
        target = self._folder / str(self._count)
        shutil.copytree(self.template, target)
        return target
