"""What commits record of their origin: the state of the training process, once for a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ckptvcs import CorruptionError, Policy, Provenance, Repo
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.ops.request import Request
from ckptvcs.ops.watch import Watcher
from ckptvcs.store.ids import Kind, ObjectId
from tests.helpers.command_line import Ckpt, environment
from tests.helpers.forging import Forger
from tests.helpers.git import git
from tests.spec_reader import SpecRepository


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A changed clone, which is the working directory; and the default settings."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "train.py").write_text("rate = 1\n")
    git(folder, "add", "train.py")
    git(folder, "commit", "-qm", "x")
    (folder / "train.py").write_text("rate = 2\n")
    (folder / "scratch.py").write_text("")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CKPT_CONFIG", os.devnull)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Repo]:
    with Repo.init(tmp_path / "run") as repo:
        yield repo


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": np.full((40, 30), step, np.float32)}, "step": step}


def origin(repo: Repo, revision: str | int = "HEAD") -> Provenance:
    found = repo.provenance(revision)
    assert found is not None
    return found


def objects(repo: Repo) -> int:
    return len(list(handle(repo).catalog.store.ids(Kind.PROVENANCE)))


def check(found: Provenance, code: Path) -> None:
    assert found.code is not None
    assert (found.code.commit, found.code.branch) == (git(code, "rev-parse", "HEAD"), "trunk")
    assert (found.code.dirty, found.code.changed) == (True, ("train.py",))
    assert found.code.untracked == ("scratch.py",)
    assert found.code.complete
    assert "-rate = 1\n+rate = 2\n" in (found.code.diff or "")
    assert found.folder == str(code)
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["numpy"] == np.__version__
    assert found.packages["torch"] == torch.__version__
    assert (found.argv, found.gpus, found.runs) == (None, (), {})


def _commit(repo: Repo, _: Path, step: int) -> None:
    repo.commit(state(step))


def _commit_async(repo: Repo, _: Path, step: int) -> None:
    repo.commit_async(state(step)).result()


def _commit_path(repo: Repo, folder: Path, step: int) -> None:
    torch.save({"w": torch.full((40,), float(step))}, folder / f"step-{step}.pt")
    repo.commit_path(folder / f"step-{step}.pt", message="")


def _join(repo: Repo, _: Path, step: int) -> None:
    with DistributedCommit(handle(repo), Request(step=step, path="together")) as commit:
        plan = commit.begin()
        commit.finish({"r.pt": encode_share(handle(repo), plan, state_checkpoint(state(step)))}, {})


def _watch(repo: Repo, folder: Path, step: int) -> None:
    (folder / "out").mkdir(exist_ok=True)
    torch.save({"w": torch.full((40,), float(step))}, folder / "out" / f"step-{step}.pt")
    assert [event.step for event in Watcher(handle(repo), folder / "out", settle=0).look()] == [
        step
    ]


WAYS = [_commit, _commit_async, _commit_path, _join, _watch]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_commit(
    way: Callable[[Repo, Path, int], None], run: Repo, code: Path, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        way(run, tmp_path, step)
    assert len(run.log()) == 3
    for entry in run.log():
        check(origin(run, entry.id), code)
        assert entry.commit.code == git(code, "rev-parse", "HEAD")
    assert objects(run) == 1
    assert run.verify().damage == []


def test_all_ways_of_one_process_share_it(run: Repo) -> None:
    run.commit(state(1))
    run.commit_async(state(2)).result()
    names = {entry.commit.provenance for entry in run.log()}
    assert len(names) == 1


def test_an_import_records_none(run: Repo, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save({"w": torch.ones(40)}, tmp_path / "old" / "step-1.pt")
    importer = Importer(handle(run), tmp_path / "old")
    importer.look(lambda _: None)
    importer.run(lambda _: None, lambda _: None)
    assert run.provenance() is None


def test_a_worker_records_the_process_that_trains(tmp_path: Path, code: Path) -> None:
    (code / "train.py").write_text(
        "import os, sys, ckptvcs\n"
        "import numpy as np\n"
        "with ckptvcs.Repo.init('../run') as repo:\n"
        "    repo.configure('provenance-argv', 'on')\n"
        "    repo.commit_async({'w': np.ones(40)}).result()\n"
        "    os.makedirs('out', exist_ok=True)\n"
        "    os.chdir('out')\n"
        "    repo.commit_async({'w': np.zeros(40)}).result()\n"
        "assert not {'torch', 'transformers', 'wandb', 'mlflow'} & set(sys.modules)\n"
    )
    command = [sys.executable, "train.py", "--rate", "3"]
    subprocess.run(command, cwd=code, check=True, env=environment())
    repo = Repo.open(tmp_path / "run")
    first, second = origin(repo, "HEAD~1"), origin(repo)
    assert first.argv == second.argv == ("train.py", "--rate", "3")
    assert (first.folder, second.folder) == (str(code), str(code / "out"))
    assert first.code is not None
    assert first.code == second.code


def test_the_settings(run: Repo, tmp_path: Path, code: Path) -> None:
    run.configure("provenance", "no-diff")
    run.commit(state(1))
    found = origin(run)
    assert found.code is not None
    assert (found.code.diff, found.code.changed, found.argv) == (None, ("train.py",), None)
    run.configure("provenance-argv", "on")
    run.commit(state(2))
    assert origin(run).argv == tuple(sys.argv)
    run.configure("provenance", "off")
    run.commit(state(3))
    assert run.provenance() is None
    assert run.log(1)[0].commit.code == git(code, "rev-parse", "HEAD")
    with Repo.init(tmp_path / "other") as other:
        other.configure("provenance", "off")
        other.commit(state(1))
        other.commit_async(state(2)).result()
        flags = json.loads((other.folder / "format").read_text())["flags"]["read"]
        assert "provenance" not in flags
        assert objects(other) == 0
    flags = json.loads((run.folder / "format").read_text())["flags"]["read"]
    assert "provenance" in flags


def test_a_change_of_head_is_seen(run: Repo, code: Path) -> None:
    run.commit(state(1))
    git(code, "commit", "-qam", "y")
    run.commit(state(2))
    found = origin(run).code
    assert found is not None
    assert (found.commit, found.dirty) == (git(code, "rev-parse", "HEAD"), False)
    assert run.log(1)[0].commit.code == found.commit


def test_without_a_clone(run: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run.commit(state(1))
    assert origin(run).code is None
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    run.commit(state(2))
    assert (origin(run).code, origin(run).folder) == (None, "")


class _Broken:
    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


def _trackers() -> dict[str, object]:
    context = SimpleNamespace(get=lambda: SimpleNamespace(project="p", name="n"))
    return {
        "wandb": SimpleNamespace(run=SimpleNamespace(entity="e", project="p", id="1")),
        "mlflow": SimpleNamespace(
            active_run=lambda: SimpleNamespace(info=SimpleNamespace(run_id="2"))
        ),
        "trackio": SimpleNamespace(context_vars=SimpleNamespace(current_run=context)),
    }


def test_runs_of_trackers(run: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in _trackers().items():
        monkeypatch.setitem(sys.modules, name, module)
    run.commit(state(1))
    run.commit_async(state(2)).result()
    for name in _trackers():
        monkeypatch.setitem(sys.modules, name, _Broken())
    run.commit(state(3))
    found = {"wandb": "e/p/1", "mlflow": "2", "trackio": "p/n"}
    assert [origin(run, step).runs for step in (1, 2, 3)] == [found, found, {}]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    run.commit(state(4))
    assert origin(run).runs == {}


def test_gpus_of_torch(run: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("it would start the GPU")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", forbidden)
    run.commit(state(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    run.commit(state(2))
    monkeypatch.setattr(torch.cuda, "get_device_name", forbidden)
    run.commit(state(3))
    assert [origin(run, n).gpus for n in (1, 2, 3)] == [(), ("GPU 0", "GPU 1"), ()]


def test_a_clone_that_cannot_be_read_stops_no_commit(run: Repo, code: Path) -> None:
    (code / ".git" / "index").write_bytes(b"junk")
    shutil.rmtree(code / ".git" / "objects")
    run.commit(state(1))
    found = origin(run).code
    assert found is not None
    assert (found.dirty, found.complete, found.diff) == (None, False, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_clone_that_somebody_else_made_above(
    run: Repo, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git(code, "rev-parse", "HEAD")
    (code / "mine").mkdir()
    monkeypatch.chdir(code / "mine")
    os.chown(code / ".git", 12345, -1)
    run.commit(state(1))
    found = origin(run).code
    assert found is not None
    assert (found.commit, found.branch) == (head, "trunk")
    assert (found.dirty, found.changed, found.diff, found.complete) == (None, (), None, False)
    os.chown(code / "mine", 12345, -1)
    run.commit(state(2))
    both = origin(run).code
    assert both is not None
    assert (both.dirty, both.changed) == (True, ("train.py",))


# -- kept, proven and repaired -----------------------------------------------------------------


def test_gc_keeps_it_as_long_as_a_commit_needs_it(run: Repo, code: Path) -> None:
    run.configure("gc-grace", "0s")
    for step in (1, 2, 3):
        run.commit(state(step))
    (code / "train.py").write_text("rate = 3\n")
    git(code, "commit", "-qam", "y")
    run.commit(state(4))
    assert objects(run) == 2
    for _ in range(2):
        run.gc(Policy(last=2))
    assert origin(run, 3).code != origin(run, 4).code
    spec = SpecRepository(run.folder)
    for step in (3, 4):
        written = json.loads(json.dumps(origin(run, step).as_json()))
        assert spec.provenance(run.resolve(step)) == written
    run.gc(Policy(last=1))
    assert origin(run).code is not None
    run.configure("provenance", "off")
    run.commit(state(5))
    for _ in range(2):
        run.gc(Policy(last=1))
    assert objects(run) == 0
    assert run.verify().damage == []


def test_a_bundle_has_it(run: Repo, code: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        run.commit(state(step))
    run.bundle(2, tmp_path / "2.ckptz")
    clone = Repo.clone(tmp_path / "2.ckptz", tmp_path / "clone")
    check(origin(clone), code)
    assert not clone.verify().damage
    flags = json.loads((clone.folder / "format").read_text())["flags"]["read"]
    assert "provenance" in flags


def test_its_bytes_belong_to_the_first_commit_that_has_it(run: Repo, code: Path) -> None:
    (code / "train.py").write_text("".join(f"{number**9}\n" for number in range(5000)))
    for step in (1, 2):
        run.commit(state(step))
    second, first = run.disk_usage(by="commit").rows[:2]
    assert (first.step, second.step) == (1, 2)
    assert first.kinds["structure"] > second.kinds["structure"] + 10_000
    run.gc(Policy(last=1), now=True)
    rows = {row.name: row.size_bytes for row in run.disk_usage().rows}
    assert rows["structure"] > 10_000
    assert "unused" not in rows


def lose(repo: Repo) -> None:
    """Take the provenance out of the only pack that has it."""
    store = handle(repo).catalog.store
    (name,) = store.ids(Kind.PROVENANCE)
    place = store.places(name)[0]
    path = repo.folder / "meta" / place.pack[:2] / f"{place.pack}.pack"
    data = bytearray(path.read_bytes())
    data[place.entry.payload_offset + 9] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)


def test_commits_go_on_without_it(run: Repo, code: Path) -> None:
    run.commit(state(1))
    lose(run)
    git(code, "commit", "-qam", "y")
    again = Repo.open(run.root)
    again.commit(state(2))
    assert origin(again).code is not None
    (damage,) = [one for one in again.verify().damage if one.what == "commit"]
    assert damage.commit == again.resolve(1)


def test_a_repair_drops_nothing_else(run: Repo) -> None:
    run.commit(state(1))
    before = run.checkout(1)["model"]["w"].tolist()
    lose(run)
    report = Repo.repair_at(run.root, drop=True)
    assert report.dropped == {run.resolve(1): ("provenance",)}
    again = Repo.open(run.root)
    assert again.verify().damage == []
    assert again.provenance(1) is None
    assert again.checkout(1)["model"]["w"].tolist() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"folder":1,"platform":"","python":""}', b"[" * 100_000, bytes(100)],
)
def test_a_forged_one_harms_nothing_else(content: bytes, forger: Forger, ckpt: Ckpt) -> None:
    name = forger.put(Kind.PROVENANCE, content)
    commit = forger.lead_to(replace(forger.commit, provenance=name))
    with pytest.raises(CorruptionError):
        forger.repo.provenance(commit)
    repo = forger.repo.root
    done = ckpt("--repo", repo, "show", "--provenance", code=CorruptionError.exit_code)
    assert done.err.startswith("error: ")
    assert commit in ckpt("--repo", repo, "show").out
    assert ckpt("--repo", repo, "log", "--json").json
    assert [damage.what for damage in forger.repo.verify().damage] == ["commit"]


@pytest.mark.parametrize("kind", [Kind.SCHEMA, None], ids=["another kind", "missing"])
def test_a_commit_that_names_none(kind: Kind | None, forger: Forger) -> None:
    name = ObjectId("ab" * 32) if kind is None else forger.commit.schema
    commit = forger.lead_to(replace(forger.commit, provenance=name))
    with pytest.raises(CorruptionError):
        forger.repo.provenance(commit)
    assert forger.repo.log(1)[0].id == commit


# -- the command line --------------------------------------------------------------------------


def test_show(ckpt: Ckpt, run: Repo, code: Path) -> None:
    run.commit(state(1))
    out = ckpt("--repo", run.root, "show", 1, "--provenance", cwd=code).out
    assert f"code       {git(code, 'rev-parse', 'HEAD')} (trunk), changed" in out
    assert "changed    train.py\nuntracked  scratch.py\n" in out
    assert out.endswith("-rate = 1\n+rate = 2\n")
    assert f"{git(code, 'rev-parse', 'HEAD')}, changed\n" in ckpt("--repo", run.root, "show").out
    assert ckpt("--repo", run.root, "show", "--json").json["dirty"] is True
    found = ckpt("--repo", run.root, "show", 1, "--provenance", "--json", cwd=code).json
    assert found["provenance"] == json.loads(json.dumps(origin(run).as_json()))
    assert found["id"] == run.resolve(1)


def test_show_without_one(ckpt: Ckpt, run: Repo) -> None:
    run.configure("provenance", "off")
    run.commit(state(1))
    done = ckpt("--repo", run.root, "show", 1, "--provenance")
    assert "no recorded provenance" in done.err
    assert ckpt("--repo", run.root, "show", 1, "--provenance", "--json").json["provenance"] is None


def test_hostile_text_is_made_harmless(ckpt: Ckpt, run: Repo) -> None:
    bad = "\x1b[2J\u202e"
    found = Provenance(bad, bad, bad, {bad: bad}, (bad,), {bad: bad}, (bad,))
    commit_checkpoint(handle(run), Request(checkpoint=state_checkpoint(state(1)), origin=found))
    assert Repo.open(run.root).provenance() == found
    out = ckpt("--repo", run.root, "show", "--provenance").out
    assert not {"\x1b", "\u202e"} & set(out)
