"""Bytes that rot, in any file of a repository: named by verify, noticed on read, never built upon;
and what is undamaged is not refused.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptvcs.errors import CkptError, CorruptionError, MissingObjectError
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head
from ckptvcs.ops.verify import Damage
from ckptvcs.repo import Repo
from ckptvcs.store.ids import Kind, ObjectId
from ckptvcs.store.pack import pack_name
from tests.helpers.crashing import SCENARIOS, Scenario, Snapshot, save
from tests.helpers.profiles import short

NIGHTLY = os.environ.get("CKPT_TEST_PROFILE") == "nightly"
TIMES = 3 if NIGHTLY else 1  # for each kind of damage to each file ...
EVERY = 1 if NIGHTLY else 3  # ... or to each third, another one for each kind

Rot = Callable[[bytes, random.Random], bytes | None]


def _zeroed(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    length = min(len(data) - at, draw.choice([1, 50, 5000]))
    return data[:at] + bytes(length) + data[at + length :]


def _flipped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


ROTS: dict[str, Rot] = {
    "flipped": _flipped,
    "zeroed": _zeroed,
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "extended": lambda data, draw: data + draw.randbytes(draw.choice([1, 100])),
    "removed": lambda data, draw: None,
}


def _build(root: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.commit_path(root / "step-5.pt", message="side", branch="side", codec="lossless")
    repo.pin(repo.resolve(3), pinned=True)
    Repo.open(root / "repo").checkout(2)  # its weights come into the cache


def _archive(root: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.configure("archive-every", "2")
    assert len(repo.gc(now=True, archive=True).archived) == 4
    Repo.open(root / "repo").checkout(4)


@pytest.fixture(scope="module", params=short(["near", "archived"], ["near"]))
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four near commits, the newest two exact, a lossless one on a side branch; or two archived
    segments between near commits.
    """
    root = tmp_path_factory.mktemp("rot") / "whole"
    root.mkdir()
    act = SCENARIOS["commit"].act
    if request.param == "near":
        Scenario("rot", act, commits=4, prepare=_build).build(root)
    else:
        Scenario("rot", act, commits=7, prepare=_archive).build(root)
    return root


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder where syncing costs nothing."""
    memory = Path("/dev/shm")
    folder = (memory if os.access(memory, os.W_OK) else Path("/tmp")) / f"ckpt-rot-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def files(root: Path, *folders: str) -> list[str]:
    """The files of the repository in some folders, but for locks."""
    store = root / "repo" / ".ckpt"
    found = [path for folder in folders for path in (store / folder).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(root)) for path in found if "-lock" not in path.name)


def some(names: list[str], kind: str) -> list[str]:
    """The files to damage."""
    return names[list(ROTS).index(kind) % EVERY :: EVERY] * TIMES


def damaged(template: Path, place: Path, name: str, rot: Rot, seed: int) -> Path | None:
    """A copy of the repository with one damaged file; None where the damage changes nothing."""
    data = (template / name).read_bytes()
    changed = rot(data, random.Random(f"{name} {seed}")) if data else b"x"
    if changed == data:
        return None
    root = place / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    (root / name).unlink()
    if changed is not None:
        (root / name).write_bytes(changed)
    return root


def readable(root: Path, whole: Snapshot) -> set[ObjectId]:
    """The commits that come back, each as it was; others raise what is documented."""
    found = set()
    for name, digest in whole.near.items():
        try:
            repo = Repo.open(root / "repo")
            (file,) = handle(repo).catalog.commit(name).files
            assert handle(repo).restorer(name, near=True).digest(file) == digest
            if name in whole.exact:
                if not repo.entry(name).exact:
                    continue  # only the near form is left: verify says so
                assert handle(repo).restorer(name).digest(file) == whole.exact[name]
            found.add(name)
        except CorruptionError:
            pass
    return found


def verified(root: Path) -> list[Damage]:
    return Repo.open(root / "repo").verify().damage


def harmed(damage: list[Damage]) -> set[ObjectId]:
    """The commits that a report names."""
    return {name for one in damage for name in (*one.commits, one.commit) if name}


@pytest.mark.parametrize("kind", ROTS)
def test_a_rotten_pack_is_named_and_never_built_upon(
    kind: str, template: Path, place: Path
) -> None:
    whole, count = Snapshot.of(template), 0
    for name in some(files(template, "packs", "meta"), kind):
        count += 1
        root = damaged(template, place, name, ROTS[kind], count)
        if root is None:
            continue
        shutil.rmtree(root / "repo" / ".ckpt" / "cache", ignore_errors=count % 2 == 0)
        damage = verified(root)
        assert damage, f"{name} was {kind}, unnoticed"
        pack = [one for one in damage if one.what == "pack"]
        assert [one.name for one in pack] == (
            [] if kind == "removed" else [name[len("repo/.ckpt/") :]]
        )
        lost = set(whole.near) - readable(root, whole)
        if any(one.what in ("commit", "ref") for one in damage):  # the way to some is lost, too
            assert lost <= set(whole.near)
        else:
            assert lost <= harmed(damage), f"{name} was {kind}"
        for one in damage:
            if one.what == "pack" and one.commits and "packs/" in str(one.name):
                assert one.objects
                assert one.tensors


@pytest.mark.parametrize("kind", ROTS)
def test_refs_and_the_format(kind: str, template: Path, place: Path) -> None:
    names = [*files(template, "refs"), "repo/.ckpt/format"]
    for number, name in enumerate(names * TIMES):
        root = damaged(template, place, name, ROTS[kind], number)
        if root is None:
            continue
        if name.endswith("format"):
            with contextlib.suppress(CkptError):  # of which the file is the subject
                assert verified(root)
            continue
        assert verified(root), f"{name} was {kind}, unnoticed"


@pytest.mark.parametrize("kind", short(ROTS, ["flipped"]))
def test_what_is_in_the_cache_is_never_built_upon(kind: str, template: Path, place: Path) -> None:
    whole = Snapshot.of(template)
    for number, name in enumerate(files(template, "cache") * TIMES * 2):
        root = damaged(template, place, name, ROTS[kind], number)
        if root is None:
            continue
        if "bases" in name and kind != "removed":
            report = Repo.open(root / "repo").verify()
            assert report.discarded == [name.removeprefix("repo/.ckpt/")]
            assert not report.damage
            assert not (root / name).exists()
            root = damaged(template, place, name, ROTS[kind], number) or root
        assert readable(root, whole) == set(whole.near), f"{name} was {kind}"
        repo = Repo.open(root / "repo")
        move_head(handle(repo), repo.resolve("main"), "main")
        save(root, range(5, 7))
        made = repo.commit_path(root / "step-6.pt", message="after")
        shutil.rmtree(root / "repo" / ".ckpt" / "cache")
        again = Repo.open(root / "repo")
        assert not again.verify().damage
        assert (
            handle(again).restorer(made.id).digest(made.commit.files[0])
            == made.commit.files[0].hash
        )


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_refs_are_mended(kind: str, template: Path, place: Path) -> None:
    whole = Snapshot.of(template)
    names = files(template, "refs")
    newest = {Path(name).parent: name for name in names}  # sorted: the last one is the newest
    for number, name in enumerate(sorted(newest.values()) * TIMES):
        root = damaged(template, place, name, ROTS[kind], number)
        if root is None:
            continue
        done = Repo.open(root / "repo").repair()
        assert len(done.refs) == 1, name
        assert not verified(root)
        again = Snapshot.of(root)
        assert again.refs.items() >= {r: c for r, c in whole.refs.items() if "heads" in r}.items()
        assert again.near.keys() == whole.near.keys()


def test_a_missing_pack_names_its_objects(template: Path, place: Path) -> None:
    for name in files(template, "packs"):
        root = damaged(template, place, name, ROTS["removed"], 0)
        assert root is not None
        damage = verified(root)
        assert all(one.objects for one in damage if one.what == "object")
        assert {one.what for one in damage} & {"object", "patch"}


@pytest.mark.parametrize("kind", ROTS)
def test_repaired_from_a_copy(kind: str, template: Path, place: Path) -> None:
    whole = Snapshot.of(template)
    for number, name in enumerate(some(files(template, "packs", "meta"), kind)):
        root = damaged(template, place, name, ROTS[kind], number)
        if root is None:
            continue
        if number % 2:  # nothing may hang on what the index remembers
            shutil.rmtree(root / "repo" / ".ckpt" / "cache")
        Repo.open(root / "repo").repair(template / "repo")
        assert not verified(root), f"{name} was {kind}"
        again = Snapshot.of(root)
        assert again.near == whole.near
        assert set(again.exact) == set(whole.exact)


def test_records_come_from_a_copy(template: Path, place: Path) -> None:
    """Nothing refers to what says that a patch faded, and all the rest of its pack can be saved."""
    store, found = handle(Repo.open(template / "repo")).catalog.store, 0
    for pack, folder in store.list_packs().items():
        for entry in store.entries(pack, folder):
            if entry.kind != Kind.RECORD:
                continue
            found += 1
            root = place / f"{pack[:8]}-{entry.id[:8]}"
            shutil.copytree(template, root)
            file = root / "repo" / ".ckpt" / pack_name(folder, pack)
            data = bytearray(file.read_bytes())
            end = entry.offset + entry.record_bytes
            data[entry.offset : end] = bytes(end - entry.offset)
            file.unlink()
            file.write_bytes(data)
            shutil.rmtree(root / "repo" / ".ckpt" / "cache")
            Repo.open(root / "repo").repair(template / "repo")
            assert not verified(root)
    assert found


@pytest.mark.parametrize("kind", ["flipped", "removed"])
def test_repaired_by_letting_go(kind: str, template: Path, place: Path) -> None:
    whole = Snapshot.of(template)
    for number, name in enumerate(some(files(template, "packs", "meta"), kind)):
        root = damaged(template, place, name, ROTS[kind], number)
        if root is None:
            continue
        shutil.rmtree(root / "repo" / ".ckpt" / "cache")  # which alone may keep a chain readable
        before = readable(root, whole)
        repo = Repo.open(root / "repo")
        done = repo.repair(drop=True)
        assert not verified(root), f"{name} was {kind}"
        again = Snapshot.of(root)
        for one in before:  # what was undamaged is still there, perhaps on another parent
            assert whole.near[one] in again.near.values()
        assert all(done.dropped.get(one, ("errors",)) == ("errors",) for one in before)
        repo = Repo.open(root / "repo")
        repo.gc()
        save(root, range(5, 7))
        repo.commit_path(root / "step-6.pt", message="after")
        assert not verified(root)


def test_a_commit_without_the_errors_of_its_tensors(template: Path, place: Path) -> None:
    root = place / "copy"
    shutil.copytree(template, root)
    repo = Repo.open(root / "repo")
    name = repo.resolve(1)
    errors = handle(repo).catalog.commit(name).errors
    assert errors is not None
    assert handle(repo).catalog.errors(name)
    (lies,) = handle(repo).catalog.store.places(errors)
    pack = root / "repo" / ".ckpt" / pack_name(lies.folder, lies.pack)
    data = bytearray(pack.read_bytes())
    data[lies.entry.offset + lies.entry.record_bytes - 1] ^= 1
    pack.write_bytes(data)
    whole, repo = Snapshot.of(template), Repo.open(root / "repo")
    assert [one.commits for one in verified(root) if one.what == "pack"] == [(name,)]
    assert repo.repair(drop=True).dropped == {name: ("errors",)}
    assert not verified(root)
    assert readable(root, whole) == set(whole.near)
    assert not handle(repo).catalog.errors(name)


def test_commits_that_only_the_index_remembers(template: Path, place: Path) -> None:
    whole = Snapshot.of(template)
    for name in files(template, "meta"):
        root = damaged(template, place, name, ROTS["removed"], 0)
        assert root is not None
        done = Repo.open(root / "repo").repair()
        assert done.from_cache
        assert set(handle(Repo.open(root / "repo")).revisions.visible()) == set(whole.near)


@pytest.mark.parametrize("subset", ["30%", "20K", "1000s"])
def test_verify_goes_on_where_it_stopped(subset: str, template: Path, place: Path) -> None:
    root = place / "copy"
    shutil.copytree(template, root)
    last = files(root, "packs")[-1]
    data = bytearray((root / last).read_bytes())
    data[len(data) // 2] ^= 1
    (root / last).write_bytes(data)
    looked, found, left = 0, False, 1
    for _ in range(30):
        report = Repo.open(root / "repo").verify(subset=subset)
        assert report.packs + report.commits + sum(d.what == "pack" for d in report.damage) > 0
        looked += 1
        found |= any(one.what == "pack" for one in report.damage)
        left = report.unchecked
        if found:
            break
    assert found
    assert left == 0 or looked > 1 or subset != "1000s"


def test_a_missing_object_is_an_error_of_its_own(template: Path, place: Path) -> None:
    root = place / "copy"
    shutil.copytree(template, root)
    shutil.rmtree(root / "repo" / ".ckpt" / "packs")
    repo = Repo.open(root / "repo")
    with pytest.raises(MissingObjectError):
        repo.checkout(1)
