"""Bad input: one clear line, an exit code that says what to do, nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptvcs
from ckptvcs.checkpoint.layout import FileSource
from ckptvcs.cli import render
from ckptvcs.encode.encoder import Encoder
from ckptvcs.errors import InvalidInputError
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import Kind
from tests.helpers.command_line import Ckpt, environment
from tests.helpers.profiles import short
from tests.helpers.training import train_on


def snapshot(store: Path) -> set[str]:
    kept = {p.name for p in store.rglob("*") if p.is_file() and "cache" not in p.parts}
    return {name for name in kept if name != "config.toml"}


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("hint: ")]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    return lines[0]


def test_refused_files(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> None:
    ckpt("init")
    before = snapshot(tmp_path / ".ckpt")
    assert "no such file" in one_line(ckpt("commit", "nothing.pt", "-m", "x", code=3).err)
    (tmp_path / "empty.pt").touch()
    assert "empty" in one_line(ckpt("commit", "empty.pt", "-m", "x", code=2).err)
    whole = run_files[0].read_bytes()
    for length in (10, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        assert "incomplete" in one_line(ckpt("commit", "cut.pt", "-m", "x", code=2).err)
    (tmp_path / "dir").mkdir()
    assert "no files" in one_line(ckpt("commit", "dir", code=2).err)
    (tmp_path / "dir" / "checkpoint-is-incomplete.txt").touch()
    assert "incomplete" in one_line(ckpt("commit", "dir", code=2).err)
    assert "codec" in one_line(ckpt("commit", run_files[0], "--codec", "zip", code=2).err)
    assert "metric" in one_line(ckpt("commit", run_files[0], "--metric", "loss", code=2).err)
    os.mkfifo(tmp_path / "pipe")
    assert "neither" in one_line(ckpt("commit", "pipe", code=2).err)
    assert snapshot(tmp_path / ".ckpt") == before


def test_small_mistakes_are_explained_in_one_line(ckpt: Ckpt, history: Path) -> None:
    assert "empty" in one_line(ckpt("checkout", "", code=2).err)
    assert "itself" in one_line(ckpt("commit", ".ckpt", code=2).err)
    assert "codec" in one_line(ckpt("commit", "model.pt", "--codec", "", code=2).err)
    (history / "cut").write_bytes(b"PK\x03")
    assert "incomplete" in one_line(ckpt("commit", "cut", code=2).err)
    left = history / ".ckpt" / "cache" / "bases" / ".deadbeef"
    left.write_bytes(b"x" * 100)
    assert "cache/bases/.deadbeef" in ckpt("gc", "--json").json["stale_files"]
    assert not left.exists()


def test_refs_that_were_tampered_with(ckpt: Ckpt, history: Path) -> None:
    middle = history / ".ckpt" / "refs" / "heads" / "main" / f"{3:016}"
    kept = middle.read_bytes()
    middle.unlink()
    assert "missing" in ckpt("verify", code=6).out
    middle.write_bytes(kept.replace(b'"action":"commit"', b'"action":"commix"'))
    assert "its hash does not match" in ckpt("verify", code=6).out
    middle.write_bytes(kept)
    ckpt("verify")


def test_modes_of_directories(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    inner = tmp_path / "d" / "inner"
    inner.mkdir(parents=True)
    (inner / "x").write_text("x")
    inner.chmod(0o750)
    ckpt("commit", "d")
    ckpt("checkout", "HEAD", "-o", "e")
    assert (tmp_path / "e" / "inner").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "e" / "inner").stat().st_mtime_ns == inner.stat().st_mtime_ns


def test_names_do_not_drive_the_terminal(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    (tmp_path / "\x1b[31mred").write_text("x")
    ckpt("commit", "\x1b[31mred", "-m", "\x1b[2J\nsecond line")
    (tmp_path / "\x1b[31mred").unlink()
    for command in (["log"], ["show"], ["status"], ["checkout", "HEAD"]):
        done = ckpt(*command)
        assert "\x1b" not in done.out + done.err


def test_raw_takes_anything(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> None:
    ckpt("init")
    cut = run_files[0].read_bytes()[:3000]
    for name, data in {"empty.pt": b"", "cut.pt": cut}.items():
        (tmp_path / name).write_bytes(data)
        ckpt("commit", name, "--raw", "-m", name)
        ckpt("checkout", "HEAD", "-o", "back")
        assert (tmp_path / "back").read_bytes() == data
        (tmp_path / "back").unlink()


def test_refused_checkouts(ckpt: Ckpt, history: Path) -> None:
    assert "-o model.pt" in ckpt("checkout", 1, "-o", "-", code=2).err
    assert "optimizer" in ckpt("checkout", 1, "--only", "weights", code=2).err
    assert "exact" in ckpt("checkout", 1, "--require", "nearly", code=2).err
    (history / "folder").mkdir()
    assert "directory" in one_line(ckpt("checkout", 1, "-o", "folder", code=2).err)


def test_no_commits_yet(ckpt: Ckpt, tmp_path: Path) -> None:
    ckpt("init")
    assert ckpt("log", "--json").json == []
    assert "no commits yet" in one_line(ckpt("checkout", "HEAD", code=3).err)
    assert ckpt("status", "--json").json["head"] is None
    assert ckpt("verify", "--json").json["ok"]
    assert "repository exists" in ckpt("init").out


def test_a_newer_format_is_refused(ckpt: Ckpt, history: Path) -> None:
    path = history / ".ckpt" / "format"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"format": 99}))
    assert "upgrade" in ckpt("log", code=7).err
    path.write_text(json.dumps(fields | {"flags": {"write": ["parity"]}}))
    ckpt("log")
    assert "parity" in ckpt("commit", "model.pt", code=7).err
    path.write_text("rubbish")
    ckpt("log", code=6)


def test_invalid_settings_are_refused(ckpt: Ckpt, history: Path) -> None:
    config = history / ".ckpt" / "config.toml"
    for text in (
        'codec = "zip"',
        "codec = 3",
        "depth = 1",
        "codec = ",
        "keyframe-depth = -1",
        "codec = []",
        "keep-exact = 0.5",
        "keep-exact = true",
    ):
        config.write_text(text)
        ckpt("config", code=2)
        ckpt("commit", "model.pt", code=2)
        ckpt("gc", code=2)
        assert "warning" in ckpt("log").err  # which needs no settings
        ckpt("verify", code=6)
    config.write_text('codec = "excp"\nkeyframe-depth = 60\nkeep-exact = 0\n')
    train_on(history / "model.pt")
    assert not ckpt("commit", "model.pt", "--json").json["exact"]


def test_ambiguous_ids(ckpt: Ckpt, history: Path) -> None:
    repo = Repo.open(history)
    made: dict[str, int] = {}
    weights = torch.ones(2)
    for step in range(10, 2000):
        entry = repo.commit({"w": weights}, step=step)
        made[entry.id[:4]] = made.get(entry.id[:4], 0) + 1
        if made[entry.id[:4]] == 2:
            break
    twice = [prefix for prefix, count in made.items() if count == 2]
    assert len(list(handle(repo).catalog.store.ids(Kind.COMMIT))) > 5
    if not twice:
        pytest.skip("no two ids began alike")
    assert "ambiguous" in one_line(ckpt("show", f"id:{twice[0]}", code=2).err)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_no_permission(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    script = (
        "import os, sys; os.setgid(65534); os.setuid(65534);"
        "sys.argv = ['ckpt', *sys.argv[1:]]; from ckptvcs.cli.app import main; main()"
    )
    for folder in (history, *history.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(0o755)

    def as_nobody(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *args],
            cwd=history,
            text=True,
            capture_output=True,
            env=environment() | {"HOME": "/tmp"},
            check=False,
        )

    probe = as_nobody("--version")
    if probe.returncode:
        pytest.skip("another user cannot run this installation")
    refused = as_nobody("commit", "model.pt", "-m", "x")
    assert refused.returncode == 8
    assert "ermission" in one_line(refused.stderr)
    assert as_nobody("log").returncode == 0  # reading needs no permission to write
    (history / "model.pt").chmod(0)
    assert "cannot read" in one_line(as_nobody("status").stderr)


@pytest.mark.parametrize("room", [40, 120, 250])
def test_a_full_disk(room: int, ckpt_process: Ckpt, tmp_path: Path, run_files: list[Path]) -> None:
    ckpt = ckpt_process
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        ckpt("--repo", mount, "init", code=None)
        done = ckpt("--repo", mount, "commit", run_files[0], "-m", "x", code=None)
        if done.code == 0:
            assert ckpt("--repo", mount, "verify", "--json").json["ok"]
            return
        assert done.code in (3, 8), done.err
        assert not list((mount / ".ckpt").glob("tmp/*"))
        if done.code == 8:
            assert "full" in done.err or "space" in done.err
            assert ckpt("--repo", mount, "log", "--json").json == []
    finally:
        subprocess.run(["umount", str(mount)], check=False)


@pytest.mark.parametrize("number", short([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_an_interrupted_commit_leaves_the_repository_unchanged(
    number: signal.Signals, ckpt_process: Ckpt, tmp_path: Path
) -> None:
    ckpt = ckpt_process
    ckpt("init")
    torch.save({"w": torch.randn(15_000_000)}, tmp_path / "big.pt")
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptvcs", "commit", "big.pt", "-m", "x"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    packs = tmp_path / ".ckpt" / "tmp"
    for _ in range(600):
        with contextlib.suppress(FileNotFoundError):  # files come and go
            if any(p.stat().st_size > 1 << 20 for p in packs.iterdir()):
                break
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in err
    assert not list(packs.iterdir())
    assert not list((tmp_path / ".ckpt" / "leases").iterdir())
    assert ckpt("log", "--json").json == []
    assert ckpt("verify", "--json").json["ok"]
    ckpt("commit", "big.pt", "-m", "x")


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "growing.pt"
    path.write_bytes(b"x" * 1000)
    source = FileSource(path)
    path.write_bytes(b"y" * 2000)
    with pytest.raises(InvalidInputError, match="changed"):
        source.check_unchanged()
    path.write_bytes(b"z" * 10)
    with pytest.raises(InvalidInputError, match="changed"):
        source.read(0, 1000)


def test_a_file_that_changes_under_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.randn(5000)}, path)
    repo = Repo.init(tmp_path / "repo")
    calm = Encoder.encode

    def rewritten(*args: Any) -> Any:
        torch.save({"w": torch.randn(5000)}, path)
        return calm(*args)

    monkeypatch.setattr(Encoder, "encode", rewritten)
    with pytest.raises(InvalidInputError, match="changed"):
        repo.commit_path(path, message="x")
    assert repo.log() == []


def test_closed_streams(history: Path) -> None:
    """Nobody reads, and no file of the repository may be taken for one of them."""
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -m ckptvcs log {closed}"
        done = subprocess.run(command, shell=True, cwd=history, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    subprocess.run(f"{sys.executable} -m ckptvcs verify >&-", shell=True, cwd=history, check=True)


def test_a_format_that_rotted_is_not_a_newer_one(ckpt: Ckpt, history: Path) -> None:
    path = history / ".ckpt" / "format"
    for old, new in (('"format":1', '"format":3'), ('"near"', '"neas"')):
        good = path.read_text()
        path.write_text(good.replace(old, new))
        assert path.read_text() != good
        found = ckpt("verify", "--json", code=6).json
        assert [one["what"] for one in found["damage"]] == ["format"]
        ckpt("verify", "--repair")
        assert ckpt("verify", "--json").json["ok"]
    path.unlink()
    assert not ckpt("verify", "--json", code=6).json["ok"]
    ckpt("log", code=6)
    ckpt("verify", "--repair")
    ckpt("log")


def test_weights_that_are_cut_off_need_raw(ckpt: Ckpt, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ckpt("init")
    save_file({"w": torch.randn(300, 300)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:50_000])
    (tmp_path / "j.pt").write_bytes(b"junk\n")
    for name in ("cut.safetensors", "j.pt"):
        done = ckpt("commit", name, "--step", 1, code=2)
        assert one_line(done.err).startswith(f"error: {name} is cut off")
        assert done.err.splitlines()[1] == (
            "hint: commit it with --raw to store the bytes as they are"
        )
    assert ckpt("log", "--json").json == []
    for name in ("cut.safetensors", "j.pt"):
        ckpt("commit", name, "--raw")
        ckpt("checkout", "HEAD", "-o", "back")
        assert (tmp_path / "back").read_bytes() == (tmp_path / name).read_bytes()
        (tmp_path / "back").unlink()


@pytest.mark.parametrize("where", [".", ".ckpt", ".ckpt/refs", ".ckpt/tmp", ".ckpt/cache"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_init_where_something_is_in_the_way(
    kind: str, where: str, ckpt: Ckpt, tmp_path: Path
) -> None:
    path = tmp_path / "new" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to("nowhere")
    done = ckpt("init", tmp_path / "new", code=None)
    assert done.code in (2, 8)
    one_line(done.err)
    assert os.path.lexists(path)


def test_links_that_lead_to_themselves(ckpt: Ckpt, tmp_path: Path, run_files: list[Path]) -> None:
    ckpt("init")
    inside = tmp_path / "in" / "checkpoint-5"
    inside.mkdir(parents=True)
    shutil.copy(run_files[0], inside / "model.pt")
    (inside / "latest").symlink_to("latest")
    (tmp_path / "loop").symlink_to("loop")
    ckpt("commit", inside)
    ckpt("import", tmp_path / "in")
    ckpt("watch", tmp_path / "in", "--once", "--settle", 0)
    for command in ("commit", "import"):
        done = ckpt(command, tmp_path / "loop", code=None)
        assert done.code in (2, 3)
        one_line(done.err)
    back = tmp_path / "back"
    ckpt("checkout", "@", "-o", back)
    assert (back / "latest").readlink() == Path("latest")
    assert (back / "model.pt").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["watch", ".", "--settle", "nan"],
        ["watch", ".", "--settle", "inf", "--once"],
        ["watch", ".", "--interval", "inf"],
        ["watch", ".", "--interval", "nan"],
        ["export", "--all", "out", "--start", "9" * 5000],
        ["log", "9" * 5000],
    ],
)
def test_numbers_that_are_none(args: list[str], ckpt: Ckpt, history: Path) -> None:
    done = ckpt(*args, code=None)
    assert done.code in (2, 3)
    one_line(done.err)


@pytest.mark.parametrize(("error", "answer"), [(EOFError, False), (KeyboardInterrupt, None)])
def test_a_question_without_an_answer(
    error: type[BaseException], answer: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        def readline(self) -> str:
            raise error

    monkeypatch.setattr(sys, "stdin", Terminal())
    if answer is None:
        with pytest.raises(KeyboardInterrupt):
            render.confirm("remove all?")
    else:
        assert render.confirm("remove all?") is answer


def test_the_package_loads_its_classes_when_they_are_asked_for() -> None:
    code = """
import sys, ckptvcs
print(*sorted(name for name in sys.modules if name.startswith("ckptvcs.")))
print(*(getattr(ckptvcs, name).__name__ for name in ckptvcs.__all__))
print(hasattr(ckptvcs, "nothing"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    loaded, names, nothing = done.stdout.splitlines()
    assert loaded == "ckptvcs.errors ckptvcs.text"
    assert names.split() == ckptvcs.__all__
    assert nothing == "False"
