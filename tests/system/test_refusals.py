"""Any call that a command makes may be refused once, or do half of its work: the command ends with
a documented code and one line, or does it all the same; the history is as it was, or the commit is
whole and is said to be there; nothing is lost, gc leaves nothing behind, and a second try works.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from errno import EACCES, EAGAIN, EMFILE, ENFILE, ENOMEM, ENOSPC, EROFS
from pathlib import Path
from typing import Any

import pytest

from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import set_ref
from ckptvcs.repo import Repo
from tests.helpers.crashing import save
from tests.helpers.refusing.asking import ERRORS, Ran, Refusal, Server, library, site

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
SEED = int(os.environ.get("CKPT_TEST_SEED", "0"))
SHORT = 10  # refusals of each command in the short profile
LONG = 520
PROCESSES = 2 if NIGHTLY else 1
LINES = 300  # characters of what a command said that are shown
CODES = frozenset(range(9)) - {1}
LASTING = {  # of which every third refusal stays
    "open": (EMFILE, ENFILE, ENOSPC, EACCES),
    "thread": (EAGAIN,),
    "mkdir": (EROFS, ENOSPC),
    "link": (EROFS, ENOSPC),
    "rename": (EROFS, ENOSPC),
    "mmap": (ENOMEM,),
}

COMMANDS = {
    "commit": ["commit", "../step-4.pt", "-m", "next", "--metric", "loss=1"],
    "gc": ["gc", "--keep-last", "2", "--now"],
    "checkout": ["checkout", "2", "-o", "../out.pt"],
    "import": ["import", "../found", "--delete-originals", "--yes"],
    "verify": ["verify"],
    "watch": ["watch", "../found", "--once", "--settle", "0", "--keep-local", "1", "--accept-near"],
    "log": ["log"],
}


@dataclass
class Counted:
    """What came of the refusals of a command."""

    refusals: int = 0
    hits: int = 0
    sites: set[str] = field(default_factory=set)
    codes: Counter[int] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)


def build(root: Path) -> None:
    """Three commits, a file for a fourth, and a folder with two more."""
    save(root, range(1, 6))
    repo = Repo.init(root / "repo")
    repo.configure("keyframe-depth", "4")
    for step in (1, 2, 3):
        repo.commit_path(root / f"step-{step}.pt", message="", metrics={"loss": 1 / step})
    set_ref(handle(repo), "tags", "first", repo.resolve(1), "tag")
    save(root / "found", range(4, 6))


class Trial:
    """One command, with one refusal after the other."""

    def __init__(self, name: str, template: Path, folder: Path, server: Server) -> None:
        self.name, self._template, self._folder, self._server = name, template, folder, server
        self._before = server.call("commits", template)
        calm = self._copy()
        learned = folder / "learned"
        assert self._run(calm, learn=learned).code == 0
        self._after = server.call("commits", calm)
        self._target = (calm / "out.pt").read_bytes() if name == "checkout" else b""
        again = self._copy()
        self._calls = self._run(again, record=True).calls
        self._root = again

    def _copy(self) -> Path:
        root = self._folder / self.name
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._template, root)
        return root

    def _run(self, root: Path, **options: Any) -> Ran:
        return self._server.run(root / "repo", *COMMANDS[self.name], **options)

    def refusals(self, most: int) -> list[Refusal]:
        """What to refuse: at each place of the program, as far as kinds and files tell them apart,
        each error of its kind; and more calls, until there are enough.
        """
        draw = random.Random(f"{SEED} {self.name}")
        numbers: Counter[str] = Counter()
        places: dict[str, list[tuple[str, int]]] = {}
        for kind, path in self._calls:
            numbers[kind] += 1
            places.setdefault(site(kind, path, self._root), []).append((kind, numbers[kind]))
        first = [
            (places[name][0], error) for name in places for error in ERRORS[places[name][0][0]]
        ]
        other = [
            (call, error)
            for calls in places.values()
            for call in calls[1:]
            for error in ERRORS[call[0]]
        ]
        draw.shuffle(first)
        draw.shuffle(other)
        if not NIGHTLY:  # of each kind first
            seen: Counter[str] = Counter()
            order = []
            for row in first:
                seen[row[0][0]] += 1
                order.append((seen[row[0][0]], row))
            first = [row for _, row in sorted(order, key=lambda pair: pair[0])]
        return [
            Refusal(kind, number, error, error in LASTING.get(kind, ()) and at % 3 == 0)
            for at, ((kind, number), error) in enumerate([*first, *other][:most])
        ]

    def refuse(self, refusal: Refusal, counted: Counted) -> None:
        """Run the command with one refusal, and look at everything."""
        root = self._copy()
        ran = self._run(root, refusal=refusal)
        counted.refusals += 1
        if ran.hit is not None:
            counted.hits += 1
            counted.sites.add(site(refusal.kind, ran.hit, root))
        counted.codes[ran.code] += 1
        problem = self._problem(root, ran)
        if problem is not None:
            counted.found.append(
                f"{self.name}: {refusal} at {ran.hit}: {problem}\n{ran.err[-LINES:]}"
            )

    def _problem(self, root: Path, ran: Ran) -> str | None:
        """What is wrong after a refusal, if anything is."""
        try:
            self._check_end(ran)
            found = self._server.call("commits", root)
            self._check_history(found, root, ran)
            nothing = self.name == "import" and not any((root / "found").iterdir())
            again = self._run(root)
            assert again.code == (3 if nothing else 0), (
                f"a second try ends with {again.code}: {again.err}"
            )
            left = self._server.call("swept", root)
            assert not left["damage"], left["damage"]
            assert not left["left"], f"gc leaves {left['left']}"
            assert len(left["commits"]) >= len(self._after["commits"])
            if self.name == "checkout":
                assert (root / "out.pt").read_bytes() == self._target
            names = {path.name for path in root.iterdir()} - {"out.pt"}
            assert names == {path.name for path in self._template.iterdir()}, names
        except AssertionError as wrong:
            return str(wrong)
        return None

    def _check_end(self, ran: Ran) -> None:
        assert ran.code in CODES, f"exit {ran.code}"
        for word in ("Traceback", "Exception ignored", "Error in"):
            assert word not in ran.err, word
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        each = self.name in ("import", "watch")  # which speak of each checkpoint
        assert len(errors) <= (3 if each else 1), errors

    def _check_history(self, found: dict[str, Any], root: Path, ran: Ran) -> None:
        assert not found["damage"], found["damage"]
        before, after = self._before["commits"], self._after["commits"]
        for name, commit in before.items():
            if self.name != "gc" or name in after:
                assert name in found["commits"], f"commit {name} is gone"
            now = found["commits"].get(name, commit)
            assert now["near"] in (commit["near"], commit["exact"]), f"commit {name} has changed"
            assert now["exact"] in (commit["exact"], None), f"commit {name} has changed"
        new = {name: one for name, one in found["commits"].items() if name not in before}
        assert len(new) <= len(after) - len(before.keys() & after.keys())
        said = ran.out + ran.err
        if new and ran.code != 0:
            count = re.search(
                r"([0-9]) of [0-9] checkpoints were committed|([0-9]) committed", said
            )
            told = int(count[1] or count[2]) if count else 0
            told += sum(name[:8] in said for name in new)
            assert told >= len(new), f"{len(new)} commits are there, which nobody says"
        for step in (4, 5) if self.name in ("import", "watch") else ():
            is_there = (root / "found" / f"step-{step}.pt").exists()
            assert is_there or any(one["step"] == step for one in new.values()), f"{step} is lost"
        is_told = self.name == "watch" and "error: step-" in ran.err  # which goes on
        if ran.code == 0 and not is_told:
            assert len(found["commits"]) == len(after), "it is not done"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return library(tmp_path)


def run(names: list[str], template: Path, folder: Path, made: Path) -> dict[str, Counted]:
    done = {}
    folder.mkdir()
    with Server(made) as server:
        for name in names:
            trial, counted = Trial(name, template, folder, server), Counted()
            for refusal in trial.refusals(LONG if NIGHTLY else SHORT):
                trial.refuse(refusal, counted)
            done[name] = counted
    return done


@pytest.mark.slow
def test_any_call_may_be_refused(cut_folder: Path, made: Path) -> None:
    template = cut_folder / "template"
    template.mkdir()
    build(template)
    names = sorted(COMMANDS)
    with ThreadPoolExecutor(PROCESSES) as pool:
        shares = [names[at::PROCESSES] for at in range(PROCESSES)]
        parts = pool.map(
            lambda at: run(shares[at], template, cut_folder / str(at), made), range(PROCESSES)
        )
        done = {name: counted for part in parts for name, counted in part.items()}
    for name, counted in sorted(done.items()):
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(counted.codes.items()))
        print(
            f"{name}: {counted.hits} of {counted.refusals} at {len(counted.sites)} sites; {codes}"
        )
    found = [text for counted in done.values() for text in counted.found]
    hits = sum(counted.hits for counted in done.values())
    print(f"{hits} refusals, {len(found)} faults")
    assert not found, "\n".join(found)
    assert hits >= (3000 if NIGHTLY else 50)
