"""Settings: of the user and of the repository; and those that change while a process lives."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptvcs import InvalidInputError, Repo
from ckptvcs.checkpoint.state import state_checkpoint
from ckptvcs.gc.retention import Policy
from ckptvcs.ops import config
from ckptvcs.ops.commit import commit_checkpoint
from ckptvcs.ops.config import KEYS, Settings
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.import_folder import Importer
from ckptvcs.ops.join import DistributedCommit, encode_share
from ckptvcs.ops.request import Request
from ckptvcs.ops.watch import Watcher
from ckptvcs.store.ids import ObjectId
from tests.helpers.crashing import states
from tests.helpers.profiles import short

STEPS = 6
Committing = Callable[[Repo, Path, int], None]


def _commit(repo: Repo, _: Path, step: int) -> None:
    repo.commit(states(step)[-1], step=step)


def _commit_async(repo: Repo, _: Path, step: int) -> None:
    repo.commit_async(states(step)[-1], step=step).result()


def _commit_path(repo: Repo, folder: Path, step: int) -> None:
    torch.save(states(step)[-1], folder / "model.pt")
    repo.commit_path(folder / "model.pt", message="", step=step)


def _join(repo: Repo, _: Path, step: int) -> None:
    with DistributedCommit(handle(repo), Request(step=step, path="together")) as commit:
        plan = commit.begin()
        shard = encode_share(handle(repo), plan, state_checkpoint(states(step)[-1]))
        commit.finish({"rank-0.pt": shard}, {})


def _import(repo: Repo, folder: Path, step: int) -> None:
    (folder / f"found-{step}").mkdir()
    torch.save(states(step)[-1], folder / f"found-{step}" / f"step-{step}.pt")
    importer = Importer(handle(repo), folder / f"found-{step}")
    importer.look(lambda _: None)
    importer.run(lambda _: None, lambda _: None)


WAYS: dict[str, Committing] = {
    "commit": _commit,
    "commit_async": _commit_async,
    "commit_path": _commit_path,
    "several processes": _join,
    "import": _import,
}


def exact(repo: Repo) -> list[int]:
    return sorted(entry.step or 0 for entry in repo.log() if entry.exact)


def change(folder: Path, key: str, value: str) -> None:
    """As another process would."""
    Repo.open(folder).configure(key, value)


@pytest.mark.parametrize("way", short(WAYS, list(WAYS)[:2]))
def test_what_is_told_to_stay_stays_from_the_next_commit_on(way: str, tmp_path: Path) -> None:
    with Repo.init(tmp_path / "repo") as repo:
        for step in range(1, STEPS + 1):
            if step == 4:
                change(repo.root, "keep-exact", "4")
            WAYS[way](repo, tmp_path, step)
        assert exact(repo) == [3, 4, 5, 6]
        change(repo.root, "keep-exact", "1")
        WAYS[way](repo, tmp_path, STEPS + 1)
        assert exact(repo) == [STEPS + 1]


def test_a_watch_that_goes_on_for_long(tmp_path: Path) -> None:
    repo, run = Repo.init(tmp_path / "repo"), tmp_path / "run"
    run.mkdir()
    watch = Watcher(handle(repo), run, settle=0)
    for step in range(1, STEPS + 1):
        torch.save(states(step)[-1], run / f"step-{step}.pt")
        if step == 4:
            change(repo.root, "keep-exact", "9")
            change(repo.root, "keyframe-depth", "1")
        assert [event.step for event in watch.look()] == [step]
    assert exact(repo) == [2, 3, 4, 5, 6]
    assert {entry.commit.depth for entry in repo.log(3)} <= {0, 1}


def test_what_is_told_to_stay_while_a_commit_is_made(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    for step in (1, 2):
        _commit(repo, tmp_path, step)
    commit_checkpoint(
        handle(repo),
        Request(step=3, checkpoint=state_checkpoint(states(3)[-1])),
        announce=lambda _: change(repo.root, "keep-exact", "3"),
    )
    assert exact(repo) == [1, 2, 3]
    assert repo.verify().damage == []


def test_gc_lets_fade_what_the_settings_say_now(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    repo.configure("keep-exact", "5")
    for step in range(1, 4):
        _commit(repo, tmp_path, step)
    change(repo.root, "keep-exact", "1")
    repo.gc()
    assert exact(repo) == [3]
    change(repo.root, "keep-best", "loss:min")
    repo.commit(states(4)[-1], step=4, metrics={"loss": 0.1})
    repo.commit(states(5)[-1], step=5, metrics={"loss": 0.2})
    repo.commit(states(6)[-1], step=6, metrics={"loss": 0.3})
    repo.gc(Policy(last=1), now=True)
    assert exact(repo) == [4, 6]


def test_settings_that_can_no_longer_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = Repo.init(tmp_path / "repo")
    for step in (1, 2):
        _commit(repo, tmp_path, step)
    whole = (repo.folder / "config.toml").read_text()
    (repo.folder / "config.toml").write_text(whole + "keep-exact = three\n")
    with caplog.at_level(logging.WARNING):
        for step in (3, 4):
            _commit(repo, tmp_path, step)
    said = [record for record in caplog.records if "config.toml" in record.getMessage()]
    assert len(said) == 1
    assert exact(repo) == [1, 2, 3, 4]
    for refused in (repo.gc, repo.settings, lambda: handle(repo).config):
        with pytest.raises(InvalidInputError, match="cannot read"):
            refused()
    with pytest.raises(InvalidInputError, match="cannot read"):
        _commit(Repo.open(repo.root), tmp_path, 5)  # it has never read others
    (repo.folder / "config.toml").write_text(whole)
    _commit(repo, tmp_path, 5)
    assert exact(repo) == [4, 5]


def test_a_change_that_no_time_and_no_size_shows(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    path = repo.folder / "config.toml"
    path.write_text("keep-exact = 2\n")
    settings, status = Settings(path), path.stat()
    assert settings.now().keep_exact == 2
    with path.open("r+") as file:
        file.write("keep-exact = 7\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert settings.now().keep_exact == 7
    assert handle(repo).config.keep_exact == 7
    assert set(repo.settings()) == set(KEYS)


def test_a_log_while_an_exact_form_fades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Repo.init(tmp_path)
    repo.configure("keep-exact", "1")
    first, second, third = states(3)
    repo.commit(first)
    repo.commit(second)
    assert exact(repo) == [2]
    reader = Repo.open(tmp_path)
    store = handle(reader).catalog.store
    calm, found = store.find, list[bytes]()

    def find(key: bytes) -> list[ObjectId]:
        names = calm(key)
        if not found and key.startswith(b"values:") and names:
            found.append(key)
            repo.commit(third)  # the exact form of the second one fades
        return names

    monkeypatch.setattr(store, "find", find)
    assert [entry.step for entry in reader.log()] == [2, 1]
    assert found
    assert exact(Repo.open(tmp_path)) == [3]


def test_settings_that_two_processes_change_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = Repo.init(tmp_path)
    other = Repo.open(tmp_path)
    calm, others = config.read_text, list[threading.Thread]()

    def read(path: Path) -> str:
        text = calm(path)
        if not others and threading.current_thread() is threading.main_thread():
            others.append(threading.Thread(target=other.configure, args=("keep-exact", "7")))
            others[0].start()
            others[0].join(0.5)
        return text

    repo.configure("keyframe-depth", "5")
    monkeypatch.setattr(config, "read_text", read)
    repo.configure("keyframe-depth", "9")
    others[0].join()
    now = handle(Repo.open(tmp_path)).config
    assert (now.keyframe_depth, now.keep_exact) == (9, 7)


# -- the settings of the user ------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file of the user, which does not exist."""
    monkeypatch.setenv("CKPT_CONFIG", str(tmp_path / "home" / "own.toml"))
    return tmp_path / "home" / "own.toml"


def test_the_repository_wins_over_the_user(own: Path, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    defaults = repo.settings()
    Repo.configure_user("keep-exact", "7")
    Repo.configure_user("keyframe-depth", "9")
    assert (repo.setting("keep-exact"), repo.setting("keyframe-depth")) == (7, 9)
    repo.configure("keep-exact", "3")
    assert (repo.setting("keep-exact"), repo.setting("keyframe-depth")) == (3, 9)
    origins = repo.setting_origins()
    assert set(origins) == set(KEYS)
    assert {key: origin for key, origin in origins.items() if origin != "default"} == {
        "codec": "repository",
        "keep-exact": "repository",
        "keyframe-depth": "user",
    }
    assert Repo.user_settings() == {"keep-exact": 7, "keyframe-depth": 9}
    repo.configure("keep-exact", None)
    assert repo.setting("keep-exact") == 7
    for key in ("keep-exact", "keyframe-depth"):
        Repo.configure_user(key, None)
    assert repo.settings() == defaults
    assert "keep-exact" not in own.read_text()


def test_a_new_repository_takes_the_codec_of_the_user(own: Path, tmp_path: Path) -> None:
    Repo.configure_user("codec", "excp-max")
    assert Repo.init(tmp_path / "a").setting("codec") == "excp-max"
    assert Repo.init(tmp_path / "b", codec="lossless").setting("codec") == "lossless"
    Repo.configure_user("codec", "excp")
    assert Repo.init(tmp_path / "a").setting("codec") == "excp-max"


def test_commits_obey_the_user(own: Path, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    _commit(repo, tmp_path, 1)
    Repo.configure_user("keep-exact", "9")
    for step in (2, 3, 4):
        _commit(repo, tmp_path, step)
    assert exact(repo) == [1, 2, 3, 4]
    own.unlink()
    _commit(repo, tmp_path, 5)
    assert exact(repo) == [4, 5]


@pytest.mark.parametrize(
    "text", ["keep-exact = three\n", "colour = 1\n", "keep-exact = -1\n", "\0"]
)
def test_settings_of_the_user_that_cannot_be_read(text: str, own: Path, tmp_path: Path) -> None:
    repo = Repo.init(tmp_path / "repo")
    for step in (1, 2):
        _commit(repo, tmp_path, step)
    own.parent.mkdir()
    own.write_text(text)
    _commit(repo, tmp_path, 3)
    for refused in (repo.gc, repo.settings, Repo.user_settings):
        with pytest.raises(InvalidInputError, match="own"):
            refused()
    with pytest.raises(InvalidInputError, match="own"):
        Repo.init(tmp_path / "other")
    own.unlink()
    assert exact(repo) == [1, 2, 3]
    assert repo.verify().damage == []


def test_where_the_settings_of_the_user_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CKPT_CONFIG")
    Repo.configure_user("keep-exact", "3")
    assert "keep-exact = 3" in (tmp_path / "xdg" / "ckptvcs" / "config.toml").read_text()
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert Repo.user_settings() == {}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    Repo.configure_user("keep-exact", "4")
    assert (tmp_path / "home" / ".config" / "ckptvcs" / "config.toml").exists()
    assert Repo.user_settings() == {"keep-exact": 4}


def test_the_file_of_the_user_may_be_a_link(own: Path, tmp_path: Path) -> None:
    own.parent.mkdir()
    (tmp_path / "dotfiles.toml").write_text("# mine\nkeep-exact = 1\n")
    own.symlink_to(tmp_path / "dotfiles.toml")
    Repo.configure_user("keep-exact", "5")
    assert own.is_symlink()
    assert own.read_text() == "# mine\nkeep-exact = 5\n"


def test_what_is_no_file_is_not_replaced(own: Path) -> None:
    own.parent.mkdir()
    os.mkfifo(own)
    with pytest.raises(InvalidInputError, match="not a file"):
        Repo.configure_user("keep-exact", "5")
    assert own.is_fifo()


def test_the_tests_do_not_read_the_settings_of_the_person_who_runs_them() -> None:
    assert Repo.user_settings() == {"provenance": "off"}
