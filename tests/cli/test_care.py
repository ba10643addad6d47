"""What commands say of a repository that needs care, and of what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptvcs import Repo
from ckptvcs.cli import gc
from ckptvcs.gc.collect import GcPlan
from tests.helpers.command_line import Ckpt
from tests.helpers.comparing import same
from tests.helpers.histories import commits, plain, rekeyed


def test_verify_deletes_a_wrong_base_and_says_so(ckpt: Ckpt, tmp_path: Path) -> None:
    repo = rekeyed(tmp_path)
    true = {entry.step: repo.checkout(entry.step or 0) for entry in repo.log()}
    (path, *others) = sorted((repo.folder / "cache" / "bases").iterdir())
    path.write_bytes(bytes(path.stat().st_size))  # as programs before this one published them
    name = f"cache/bases/{path.name}"
    done = ckpt("verify", cwd=tmp_path)
    assert done.out.endswith("all good\n")
    assert done.err.startswith(f"note: cached base {name} was wrong and is deleted; ")
    assert not path.exists()
    assert all(other.exists() for other in others)
    assert ckpt("verify", cwd=tmp_path).err == ""
    path.write_bytes(b"")
    found = ckpt("verify", "--json", cwd=tmp_path).json
    assert (found["ok"], found["damage"], found["discarded"]) == (True, [], [name])
    path.write_bytes(bytes(10**5))  # and who reads it without that
    again = Repo.open(tmp_path)
    for step, state in true.items():
        assert same(plain(again.checkout(step or 0)), plain(state))


def sizes(ckpt: Ckpt, *args: object) -> tuple[Any, int, int]:
    before = ckpt("stats", "--json").json["stored_bytes"]
    found = ckpt("gc", *args, "--json").json
    return found, before, ckpt("stats", "--json").json["stored_bytes"]


def test_gc_of_the_command_line(ckpt: Ckpt, tmp_path: Path) -> None:
    commits(Repo.init(tmp_path), 3, 9, "near")
    for rekey in ([], ["--rekey"]):
        found, before, after = sizes(ckpt, "--keep-last", 4, "--dry-run", *rekey)
        assert before == after == found["freed_bytes"] + found["kept_bytes"]
    found, before, after = sizes(ckpt, "--keep-last", 4, "--no-sweep")
    assert found["freed_bytes"] + found["kept_bytes"] == after
    rules = ["--keep-last", 1]
    for args in ([], ["--keep-every", 3], ["--rekey"], [*rules, "--rekey"], [*rules, "--now"], []):
        found, before, after = sizes(ckpt, *args)
        assert (found["freed_bytes"], found["kept_bytes"]) == (before - after, after)
    assert "does not include what --rekey frees" in ckpt("gc", "--rekey", "--dry-run").err
    assert "freed 0 B, kept " in ckpt("gc").out


def test_how_gc_says_that_records_took_more() -> None:
    plan = GcPlan((), (), (), {}, (), -300, 5000)
    said = gc.describe_sizes(plan, dry_run=False, sweep=True)
    assert said == "nothing to free: takes 300 B more, kept 5 kB"
    assert "would take 300 B" in gc.describe_sizes(plan, dry_run=True, sweep=True)
    plan = GcPlan((), (), (), {}, (), 300, 5000)
    assert gc.describe_sizes(plan, dry_run=False, sweep=True) == "freed 300 B, kept 5 kB"
    assert gc.describe_sizes(plan, dry_run=True, sweep=True) == "would free 300 B, kept 5 kB"
    said = gc.describe_sizes(plan, dry_run=False, sweep=False)
    assert said == "the next sweep frees 300 B, kept 5 kB"


def test_words_about_refs(ckpt: Ckpt, history: Path, run_files: list[Path]) -> None:
    ckpt("pin", 4)
    ckpt("pin", 5)
    pinned = ckpt("log", "--json").json[0]["id"]
    graph = ckpt("log", "--graph").out
    assert pinned not in graph
    assert "(HEAD -> main, pinned) " in graph
    assert graph.count("pinned") == 2
    ckpt("checkout", 2)
    (history / "model.pt").write_bytes(run_files[3].read_bytes())
    ckpt("commit", "model.pt")
    assert ckpt("show", "main-2", "--json").json["branch"] == "main-2"
    assert ckpt("show", "main", "--json").json["branch"] == "main"
    assert ckpt("show", "main~1", "--json").json["branch"] is None
    assert {row["branch"] for row in ckpt("log", "main", "--json").json} == {"main"}
    ckpt("branch", "same")
    assert ckpt("show", "HEAD", "--json").json["branch"] == "main-2"  # rather than `same`
    assert ckpt("reflog").out.startswith("time (UTC) ")
    ckpt("config", "keep-best", "loss:min")
    rows = ckpt("gc", "--keep-best", "loss:min:1", "--dry-run", "--json").json["commits"]
    best = [row["reasons"] for row in rows if "best loss" in row["reasons"]]
    assert best
    assert all(len(reasons) == len(set(reasons)) for reasons in best)
