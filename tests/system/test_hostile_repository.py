"""A repository that somebody else made: every command ends, in an error that is documented, and
writes nothing outside its target.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.history.commit import FileEntry
from ckptvcs.history.recipe import Frame, Recipe, dump_bundle, dump_recipe, slice_hash
from ckptvcs.history.records import DropRecord, dump_drop_record
from ckptvcs.history.schema import Schema, TensorInfo, View
from ckptvcs.ops.checkout import save_part
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import Kind, ObjectId
from tests.helpers.forging import Forger
from tests.helpers.fuzzing import little_room

MISSING = ObjectId("f" * 64)


WEIGHT = Schema((TensorInfo("w", "U8", (1000,), "model", "other"),))


def recipe_of(
    forger: Forger, frame: Callable[[ObjectId], Frame], **how: Any
) -> Callable[[ObjectId], ObjectId]:
    """A recipe for a table, and the bundle that it names."""

    def make(values: ObjectId) -> ObjectId:
        bundle = forger.put(Kind.BUNDLE, dump_bundle([frame(values)]), b"\0")
        recipe = Recipe(values, 0, (bundle,), (0,), (0,))
        return forger.put(Kind.RECIPE, dump_recipe(replace(recipe, **how)))

    return make


SLICE = (0, 1, slice_hash(b"\0"))


def no_parent(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, parents=(MISSING,)))


def no_schema(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, schema=MISSING))


def no_recipe(forger: Forger) -> None:
    forger.part(WEIGHT, bytes(32), lambda name: name)


def another_kind(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, schema=forger.honest.id))


def own_base(forger: Forger) -> None:
    forger.part(
        WEIGHT, bytes(32), recipe_of(forger, lambda values: Frame((values, 0), 1, None, (SLICE,)))
    )


def deep_base(forger: Forger) -> None:
    forger.part(
        WEIGHT,
        bytes(32),
        recipe_of(forger, lambda values: Frame((values, 0), (1 << 63) - 1, None, (SLICE,))),
    )


def base_outside(forger: Forger) -> None:
    forger.part(
        WEIGHT,
        bytes(32),
        recipe_of(forger, lambda values: Frame((values, 1 << 62), 3, None, (SLICE,))),
    )


def region_outside(forger: Forger) -> None:
    slices = ((1 << 62, 1 << 62, bytes(16)),)
    forger.part(WEIGHT, bytes(32), recipe_of(forger, lambda _: Frame(None, 0, None, slices)))


def frame_outside(forger: Forger) -> None:
    frames = recipe_of(forger, lambda _: Frame(None, 0, None, (SLICE,)), frames=(1 << 62,))
    forger.part(WEIGHT, bytes(32), frames)


def short_recipe(forger: Forger) -> None:
    frames = recipe_of(forger, lambda _: Frame(None, 0, None, ()), owners=(), frames=())
    forger.part(WEIGHT, bytes(32), frames)


def short_table(forger: Forger) -> None:
    forger.part(WEIGHT, b"", recipe_of(forger, lambda _: Frame(None, 0, None, (SLICE,))))


def huge_tensor(forger: Forger) -> None:
    schema = Schema((TensorInfo("w", "F64", ((1 << 44) - 1,), "model", "weight"),))
    forger.part(schema, bytes(32), recipe_of(forger, lambda _: Frame(None, 0, None, (SLICE,))))


def huger_tensor(forger: Forger) -> None:
    schema = Schema((TensorInfo("w", "F64", (1 << 55,), "model", "weight"),))
    forger.part(schema, bytes(32), recipe_of(forger, lambda _: Frame(None, 0, None, (SLICE,))))


def view_outside(forger: Forger) -> None:
    view = View("w", "U8", 0, (1 << 40,), (1,))
    schema = Schema((TensorInfo("w", "U8", (1000,), "model", "other", views=(view,)),))
    forger.part(schema, bytes(32), recipe_of(forger, lambda _: Frame(None, 0, None, (SLICE,))))


def all_let_go(forger: Forger) -> None:
    record = DropRecord("drop", (forger.honest.id, MISSING) * 1000, (), "rule", "")
    forger.put(Kind.RECORD, dump_drop_record(record))


def huge_step(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, step=(1 << 63) - 1, raw_bytes=(1 << 63) - 1))


def no_text(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, message="\ud800\x1b[2J", host="\udcff", path="\ud800"))


def nested(forger: Forger) -> None:
    forger.lead_to(replace(forger.commit, errors=forger.put(Kind.ERRORS, b"[" * 500_000)))


def last_generation(forger: Forger) -> None:
    folder = forger.repo.folder / "refs" / "heads" / "main"
    fields = json.loads((folder / f"{1:016}").read_bytes())
    number = 10**16 - 1
    (folder / f"{number}").write_text(json.dumps(fields | {"generation": number}))


def no_branch(forger: Forger) -> None:
    folder = forger.repo.folder / "refs" / "HEAD"
    fields = json.loads((folder / f"{1:016}").read_bytes()) | {"generation": 2, "branch": "../x"}
    (folder / f"{2:016}").write_text(json.dumps(fields))


def undone_forever(forger: Forger) -> None:
    folder = forger.repo.folder / "refs" / "heads" / "main"
    fields = json.loads((folder / f"{1:016}").read_bytes()) | {"generation": 2, "action": "undo 3"}
    (folder / f"{2:016}").write_text(json.dumps(fields))


def pipes(forger: Forger) -> None:
    os.mkfifo(forger.repo.folder / "refs" / "heads" / "main" / f"{2:016}")
    (forger.repo.folder / "packs" / "ab").mkdir(exist_ok=True)
    os.mkfifo(forger.repo.folder / "packs" / "ab" / f"{'ab' * 32}.pack")


FORGERIES = [
    no_parent,
    no_schema,
    no_recipe,
    another_kind,
    own_base,
    deep_base,
    base_outside,
    region_outside,
    frame_outside,
    short_recipe,
    short_table,
    huge_tensor,
    huger_tensor,
    view_outside,
    all_let_go,
    huge_step,
    no_text,
    nested,
    last_generation,
    no_branch,
    undone_forever,
    pipes,
]


def everything(repo: Repo, folder: Path) -> None:
    """All that can be asked of a repository; each ends."""
    head = repo.resolve("HEAD")
    for ask in (
        lambda: repo.log(all_branches=True),
        repo.stats,
        repo.reflog,
        repo.plan_gc,
        lambda: repo.checkout_files(head, folder / "out" / "x", force=True),
        lambda: save_part(handle(repo), head, "model", folder / "out" / "y.pt"),
        lambda: repo.checkout("HEAD"),
        lambda: repo.tensor("w"),
        lambda: repo.diff(head, head),
        lambda: list(repo.trajectory()),
        lambda: handle(repo).history.graph(),
        lambda: repo.commit_path(folder / "model.dat", message="on top", step=1 << 61),
        repo.undo,
    ):
        with contextlib.suppress(CkptError):
            ask()


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.__name__)
def test_every_question_ends(
    forgery: Callable[[Forger], None], forger: Forger, tmp_path: Path
) -> None:
    forgery(forger)
    with little_room(), contextlib.suppress(CkptError):
        repo = Repo.open(forger.repo.folder)
        repo.verify()
        everything(repo, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"repo", "model.dat", "out"}


DAMAGED = [f for f in FORGERIES if f not in (all_let_go, huge_step, no_text, undone_forever)]


@pytest.mark.parametrize("forgery", DAMAGED, ids=lambda forgery: forgery.__name__)
def test_verify_says_what_is_wrong(forgery: Callable[[Forger], None], forger: Forger) -> None:
    forgery(forger)
    with little_room():
        try:
            repo = Repo.open(forger.repo.folder)
        except CorruptionError:
            return  # it is so damaged that nothing can be asked
        assert repo.verify().damage


# -- where a checkout writes -----------------------------------------------------------------------

ESCAPES: dict[str, Callable[[Forger, Path], tuple[FileEntry, ...]]] = {
    "absolute": lambda f, out: f.links((str(out / "new"), None)),
    "above": lambda f, _: f.links(("../outside/new", None)),
    "through": lambda f, _: f.links(("a/../../outside/new", None)),
    "below a link": lambda f, out: f.links(("a", str(out)), ("a/new", "x")),
    "folder below a link": lambda f, out: f.links(("a", str(out)), ("a/new", None)),
    "instead of a file": lambda f, out: f.links(("a", str(out)), ("a/kept", "x")),
    "a folder that is a link": lambda f, out: f.links(("a", str(out)), ("a", None)),
    "a link to no name": lambda f, _: f.links(("a", "x\0y")),
    "a link to half a character": lambda f, _: f.links(("a", "\ud800")),
    "no name": lambda f, _: f.links(("a\0b", None)),
    "half a character": lambda f, _: f.links(("\ud800", None)),
    "long": lambda f, _: f.links(("x" * 4000, None)),
    "a repository": lambda f, _: f.links((".ckpt", None), (".CKPT/refs", "x")),
    "twice": lambda f, _: f.links(("file", "x"), ("file", None)),
}


@pytest.mark.parametrize("again", [False, True], ids=["fresh", "over a link"])
@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_is_written_elsewhere(
    name: str, again: bool, forger: Forger, tmp_path: Path
) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir(mode=0o755)
    (outside / "kept").write_text("kept")
    os.utime(outside, ns=(10**18, 10**18))
    if again:
        target.mkdir()
        (target / "a").symlink_to(outside)
        (target / "file").symlink_to(outside / "kept")
    made = forger.folder(*ESCAPES[name](forger, outside))
    with contextlib.suppress(CkptError):
        forger.repo.checkout_files(made, target, force=True)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    assert not (outside / "kept").is_symlink()
    status = outside.stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o755, 10**18)
    assert {path.name for path in tmp_path.iterdir()} <= {"repo", "model.dat", "outside", "target"}


@pytest.mark.parametrize("path", ["/x", "../x", ".ckpt/config.toml", ".CKPT/refs/x", "a\0b", ""])
def test_where_a_commit_says_it_belongs(path: str, forger: Forger) -> None:
    made = forger.lead_to(replace(forger.commit, path=path, inside=True))
    before = sorted(forger.repo.folder.rglob("*"))
    with pytest.raises(CorruptionError):
        forger.repo.checkout_files(made, force=True)
    assert sorted(forger.repo.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["packs", "meta", "refs", "leases", "marks", "tmp"])
def test_folders_that_are_links(name: str, forger: Forger, tmp_path: Path) -> None:
    """What is written below them, or swept, would be somewhere else."""
    folder, outside = forger.repo.folder, tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(CorruptionError, match="link"):
        Repo.open(folder)
    assert sorted(outside.rglob("*")) == before


def test_folders_of_refs_and_packs_that_are_links(forger: Forger, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    main = forger.repo.folder / "refs" / "heads" / "main"
    main.rename(outside)
    main.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(CorruptionError, match="link"):
        forger.repo.commit({"a": [1]}, step=2)
    assert sorted(outside.rglob("*")) == before
