"""What a repository hangs on, damaged: refs, `format`, settings; and what is where a file was."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptvcs.errors import ConflictError, CorruptionError, InvalidInputError, NotFoundError
from ckptvcs.gc.retention import Policy
from ckptvcs.ops.history_reader import handle
from ckptvcs.ops.refs import move_head, set_ref
from ckptvcs.repo import Repo
from tests.helpers.crashing import SCENARIOS, Scenario, Snapshot, refs

REFS = ["HEAD", "heads/main", "heads/side", "tags/first", "tags/moved"]


def _build(root: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.commit_path(root / "step-5.pt", message="side", branch="side", codec="lossless")
    repo.pin(repo.resolve(3), pinned=True)
    for step in (2, 4):
        set_ref(handle(repo), "tags", "moved", repo.resolve(step), "tag")
    move_head(handle(repo), repo.resolve(1), None)
    move_head(handle(repo), repo.resolve(4), "main")
    repo.configure("keep-exact", "3")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four near commits on main, a lossless one on a side branch, tags, a pin."""
    root = tmp_path_factory.mktemp("mending") / "whole"
    root.mkdir()
    Scenario("mending", SCENARIOS["commit"].act, commits=4, prepare=_build).build(root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(template, tmp_path / "copy")
    return tmp_path / "copy"


def generations(root: Path, ref: str) -> list[Path]:
    return sorted((root / "repo" / ".ckpt" / "refs" / ref).iterdir())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(to: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name if to == "itself" else to)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "flipped": _flip,
    "emptied": lambda path: os.truncate(path, 0),
    "a folder": _folder,
    "a link to nothing": _link("nowhere"),
    "a link to itself": _link("itself"),
}


KINDS = [
    pytest.param(kind, marks=() if kind in ("removed", "flipped") else pytest.mark.slow)
    for kind in DAMAGE
]


def damage(root: Path) -> list[str]:
    return [one.what for one in Repo.open(root / "repo").verify().damage]


def without_cache(root: Path) -> None:
    shutil.rmtree(root / "repo" / ".ckpt" / "cache")


def newest_pin(root: Path) -> str:
    return f"pins/{Repo.open(root / 'repo').resolve(3)}"


# -- refs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ref", [*REFS, "pins"])
def test_the_newest_generation_is_missed_and_comes_back(kind: str, ref: str, root: Path) -> None:
    whole, log = Snapshot.of(root), len(Repo.open(root / "repo").log(all_branches=True))
    ref = newest_pin(root) if ref == "pins" else ref
    before = handle(Repo.open(root / "repo")).refs.reflog(ref)
    DAMAGE[kind](generations(root, ref)[-1])
    repo = Repo.open(root / "repo")
    assert [one.name for one in repo.verify().damage] == [ref]
    with pytest.raises(CorruptionError):
        handle(repo).refs.read(ref)
    with pytest.raises(CorruptionError):
        repo.gc()
    done = repo.repair()
    assert (done.refs, done.inferred) == ([ref], {})
    assert not damage(root)
    again = Repo.open(root / "repo")
    assert handle(again).refs.reflog(ref) == before
    assert Snapshot.of(root) == whole
    assert len(again.log(all_branches=True)) == log


@pytest.mark.parametrize("ref", REFS)
def test_a_ref_that_is_gone_whole(ref: str, root: Path) -> None:
    whole = Snapshot.of(root)
    shutil.rmtree(root / "repo" / ".ckpt" / "refs" / ref)
    repo = Repo.open(root / "repo")
    assert damage(root) == ["ref"]
    with pytest.raises(CorruptionError):
        repo.gc()
    repo.repair()
    assert refs(Repo.open(root / "repo")) == whole.refs
    left = len(generations(root, ref)) == 1 and generations(root, ref)[0].name.endswith("01")
    assert damage(root) == ([] if left else ["ref"])  # its past is still lost
    Repo.open(root / "repo").repair(drop=True)
    assert not damage(root)
    assert Snapshot.of(root) == whole


@pytest.mark.parametrize("ref", [*REFS, "pins"])
def test_refs_come_from_a_copy(ref: str, template: Path, root: Path) -> None:
    ref = newest_pin(root) if ref == "pins" else ref
    before = handle(Repo.open(template / "repo")).refs.reflog(ref)
    for what in ("newest", "oldest", "whole", "truncated"):
        here = root.parent / what
        shutil.copytree(template, here)
        without_cache(here)
        files = generations(here, ref)
        if what == "whole":
            shutil.rmtree(files[0].parent)
        elif what == "truncated" and ref.startswith("heads/"):
            files[-1].unlink()  # as if it had never been: only the copy knows
        else:
            _flip(files[-1 if what == "newest" else 0])
        Repo.open(here / "repo").repair(template / "repo")
        assert not damage(here), what
        assert handle(Repo.open(here / "repo")).refs.reflog(ref) == before, what
        assert refs(Repo.open(here / "repo")) == refs(Repo.open(template / "repo"))


def test_what_a_copy_went_on_to_do_stays_there(template: Path, root: Path) -> None:
    other = root.parent / "other"
    shutil.copytree(template, other)
    theirs = Repo.open(other / "repo")
    theirs.commit_path(other / "step-5.pt", message="theirs")
    set_ref(handle(theirs), "tags", "first", theirs.resolve(2), "tag")
    before = refs(Repo.open(root / "repo"))
    without_cache(root)
    assert not Repo.open(root / "repo").repair(other / "repo").refs
    assert refs(Repo.open(root / "repo")) == before
    ours = Repo.open(root / "repo")
    made = ours.commit_path(root / "step-6.pt", message="ours")
    without_cache(root)
    _flip(generations(root, "heads/main")[-1])
    done = Repo.open(root / "repo").repair(other / "repo")
    assert done.inferred == {"heads/main": made.id}  # not the commit that followed in the copy


def test_a_copy_of_another_history_is_not_asked(root: Path) -> None:
    other = Repo.init(root / "other")
    other.commit_path(root / "step-1.pt", message="")
    set_ref(handle(other), "tags", "new", other.resolve(1), "tag")
    without_cache(root)
    shutil.rmtree(root / "repo" / ".ckpt" / "refs" / "tags" / "first")
    assert not Repo.open(root / "repo").repair(root / "other").refs


@pytest.mark.parametrize("where", ["oldest", "middle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ref", ["HEAD", "heads/main"])
def test_an_older_generation_costs_nothing_else(
    ref: str, kind: str, where: str, template: Path, root: Path
) -> None:
    number = 0 if where == "oldest" else 1
    full = Repo.open(root / "repo").verify()
    DAMAGE[kind](generations(root, ref)[number])
    without_cache(root)
    report = Repo.open(root / "repo").verify()
    assert [one.name for one in report.damage] == [ref]
    assert (report.commits, report.files, report.unreachable) == (full.commits, full.files, [])
    repo = Repo.open(root / "repo")
    repo.commit_path(root / "step-5.pt", message="on")
    repo.gc()
    assert repo.repair().refs == []
    assert damage(root) == ["ref"]
    for drop in (False, True):
        here = root.parent / f"again-{drop}"
        shutil.copytree(root, here, symlinks=True)
        done = Repo.open(here / "repo").repair(None if drop else template / "repo", drop=drop)
        assert done.refs == [ref]
        assert not damage(here)
        events = Repo.open(here / "repo").reflog("main")
        actions = [event.action for event in events if not event.count]
        assert len(actions) == 5
        assert actions.count("lost") == (drop and ref == "heads/main")


def test_nothing_is_undone_to_what_is_lost(root: Path) -> None:
    without_cache(root)
    _flip(generations(root, "heads/main")[-2])
    repo = Repo.open(root / "repo")
    with pytest.raises(CorruptionError):
        repo.undo()
    repo.repair(drop=True)
    with pytest.raises(ConflictError, match="lost"):
        Repo.open(root / "repo").undo()


def test_a_pin_stays_and_a_tag_is_not_guessed(root: Path) -> None:
    without_cache(root)
    pin, name = newest_pin(root), Repo.open(root / "repo").resolve(3)
    without_cache(root)
    for ref in (pin, "tags/first", "tags/moved"):
        _flip(generations(root, ref)[-1])
    done = Repo.open(root / "repo").repair()
    assert done.inferred == {pin: name}
    assert damage(root) == ["ref", "ref"]
    with pytest.raises(CorruptionError):
        Repo.open(root / "repo").resolve("moved")
    done = Repo.open(root / "repo").repair(drop=True)
    again = Repo.open(root / "repo")
    assert done.inferred == {"tags/first": None, "tags/moved": again.resolve(2)}
    assert not damage(root)
    assert handle(again).refs.targets("pins") == {name}


def test_a_branch_whose_newest_generation_no_one_remembers(root: Path) -> None:
    """As after a commit that came to nothing: said, by gc too, before it goes."""
    name = Repo.open(root / "repo").commit_path(root / "step-5.pt", message="on").id
    generations(root, "heads/main")[-1].unlink()
    without_cache(root)
    report = Repo.open(root / "repo").verify()
    assert (report.damage, report.unreachable) == ([], [name])
    assert Repo.open(root / "repo").plan_gc().unreachable == (name,)
    repo = Repo.open(root / "repo")
    set_ref(handle(repo), "heads", "found", name, "branch")
    assert not repo.verify().unreachable


def test_a_rotten_spare_is_no_damage(root: Path) -> None:
    spares = [path for path in (root / "repo/.ckpt/cache/refs").rglob("*") if path.is_file()]
    assert len(spares) == len(REFS) + 1
    for number, path in enumerate(spares):
        list(DAMAGE.values())[1 + number % 5](path)
    assert not damage(root)
    Repo.open(root / "repo").commit_path(root / "step-5.pt", message="on")
    assert not damage(root)


# -- format and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_lost_format_is_made_anew(kind: str, copy: bool, template: Path, root: Path) -> None:
    whole = Snapshot.of(root)
    DAMAGE[kind](root / "repo" / ".ckpt" / "format")
    if kind != "flipped":
        for use in (Repo.open, Repo.init):
            with pytest.raises(CorruptionError):
                use(root / "repo")
    assert Repo.repair_at(root / "repo", template / "repo" if copy else None).files == ["format"]
    assert not damage(root)
    assert Snapshot.of(root) == whole
    Repo.open(root / "repo").commit_path(root / "step-5.pt", message="on")
    Repo.open(root / "repo").gc(Policy(last=1), now=True)
    assert not damage(root)


def test_a_folder_without_a_repository_is_none(tmp_path: Path) -> None:
    (tmp_path / ".ckpt" / "packs").mkdir(parents=True)
    with pytest.raises(NotFoundError):
        Repo.open(tmp_path)
    assert Repo.init(tmp_path).log() == []


@pytest.mark.parametrize(
    "kind", ["a bad line", "an unknown key", "removed", "a folder", "a link to itself"]
)
def test_settings_that_cannot_be_read(kind: str, template: Path, root: Path) -> None:
    file, whole = root / "repo" / ".ckpt" / "config.toml", Snapshot.of(root)
    if kind == "a bad line":
        file.write_text(file.read_text() + "keep-best = [\n")
    elif kind == "an unknown key":
        file.write_text(file.read_text() + "keep-all = 1\n")
    else:
        DAMAGE[kind](file)
    assert Snapshot.of(root) == whole
    assert damage(root) == ["settings"]
    for use in (
        Repo.gc,
        Repo.settings,
        lambda repo: repo.commit_path(root / "step-5.pt", message=""),
    ):
        with pytest.raises(InvalidInputError):
            use(Repo.open(root / "repo"))
    assert not Repo.repair_at(root / "repo").files
    for source, drop in ((template / "repo", False), (None, True)):
        here = root.parent / f"again-{drop}"
        shutil.copytree(root, here, symlinks=True)
        repo = Repo.open(here / "repo")
        assert repo.repair(source, drop=drop).files == ["config.toml"]
        assert not damage(here)
        kept = source is not None or "line" in kind or "key" in kind
        assert handle(repo).config.keep_exact == (3 if kept else 2)


def test_lost_settings_are_set_anew(root: Path) -> None:
    (root / "repo" / ".ckpt" / "config.toml").unlink()
    repo = Repo.open(root / "repo")
    repo.configure("keep-exact", "5")
    assert handle(repo).config.keep_exact == 5
    assert not damage(root)


# -- what stands where a file was ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "a link to itself"])
def test_no_file_where_a_pack_was(kind: str, template: Path, root: Path) -> None:
    whole, store = Snapshot.of(root), template / "repo" / ".ckpt"
    for pack in sorted([*store.glob("packs/*/*.pack"), *store.glob("meta/*/*.pack")]):
        here = root.parent / "here"
        shutil.copytree(template, here)
        DAMAGE[kind](here / "repo" / ".ckpt" / pack.relative_to(store))
        assert damage(here)
        for name in whole.near:
            repo = Repo.open(here / "repo")
            with contextlib.suppress(CorruptionError):
                handle(repo).restorer(name).digest(handle(repo).catalog.commit(name).files[0])
        Repo.open(here / "repo").repair(template / "repo")
        assert not damage(here)
        assert Snapshot.of(here) == whole
        shutil.rmtree(here)


@pytest.fixture
def pipes(root: Path) -> Path:
    """Pipes that nobody writes to, in the cache."""
    cache = root / "repo" / ".ckpt" / "cache"
    for name in ("verified.json", "refs/HEAD"):
        (cache / name).unlink(missing_ok=True)
        os.mkfifo(cache / name)
    return root


def test_pipes_in_the_cache_are_not_waited_for(pipes: Path) -> None:
    assert not damage(pipes)


def test_a_note_of_what_was_verified_that_is_no_number(root: Path) -> None:
    cache = root / "repo" / ".ckpt" / "cache"
    (cache / "verified.json").write_text('{"packs/x": %s}' % ("9" * 400))
    assert not damage(root)


def test_a_file_where_the_cache_was(root: Path) -> None:
    cache = root / "repo" / ".ckpt" / "cache"
    shutil.rmtree(cache)
    cache.write_bytes(b"")
    repo = Repo.open(root / "repo")
    repo.commit_path(root / "step-5.pt", message="on")
    repo.gc()
    assert not damage(root)


def test_a_rotten_base_is_cleared_away(root: Path) -> None:
    repo = Repo.open(root / "repo")
    repo.checkout(2)
    (base, *_) = (repo.folder / "cache" / "bases").iterdir()
    shutil.rmtree(base) if base.is_dir() else base.unlink()
    base.mkdir()
    assert Repo.open(root / "repo").verify().discarded == [f"cache/bases/{base.name}"]
    assert not base.exists()
    assert not damage(root)


# -- commits and files -----------------------------------------------------------------------------


def test_a_lost_commit_is_named(root: Path) -> None:
    repo = Repo.open(root / "repo")
    name = repo.resolve(2)
    (place,) = handle(repo).catalog.store.places(name)
    (repo.folder / place.folder / place.pack[:2] / f"{place.pack}.pack").unlink()
    without_cache(root)
    again = Repo.open(root / "repo")
    assert any(name in one.objects and name in one.commits for one in again.verify().damage)
    for text in (name, name[:12], f"id:{name[:8]}"):
        with pytest.raises(CorruptionError):
            again.resolve(text)


def test_only_what_is_stored_is_overwritten(root: Path) -> None:
    """The file in its place may be the only other copy of what the packs hold no more."""
    repo = Repo.open(root / "repo")
    where = root / "out.pt"
    shutil.copy(root / "step-5.pt", where)
    entry = repo.entry(repo.resolve("side"))
    assert entry.exact
    for table in [part.values for part in entry.commit.parts.values()]:
        for _, recipe in handle(repo).catalog.recipes(table):
            for bundle in recipe.bundles:
                for place in handle(repo).catalog.store.places(bundle):
                    _flip(repo.folder / place.folder / place.pack[:2] / f"{place.pack}.pack")
    with pytest.raises(ConflictError):
        repo.checkout_files(repo.resolve(4), where)
    assert where.read_bytes() == (root / "step-5.pt").read_bytes()


def test_a_file_of_a_commit_that_was_dropped_is_kept(root: Path) -> None:
    repo = Repo.open(root / "repo")
    where = root / "out.pt"
    shutil.copy(root / "step-2.pt", where)
    repo.gc(Policy(last=1), now=True)
    with pytest.raises(ConflictError):
        repo.checkout_files(repo.resolve(4), where)


def test_a_version_that_rotted_is_damage(root: Path) -> None:
    """One flipped bit in one pack must not look like a program that is too old for all of them."""
    whole = Snapshot.of(root)
    for pack in sorted((root / "repo" / ".ckpt").glob("packs/*/*.pack")):
        data = bytearray(pack.read_bytes())
        data[9] ^= 4  # the version lies behind the eight bytes of the magic
        pack.write_bytes(data)
        without_cache(root)
        assert "pack" in damage(root)
        data[9] ^= 4
        pack.write_bytes(data)
    assert Snapshot.of(root) == whole


@pytest.mark.parametrize("kind", ["a file", "a link to itself", "a link to nothing"])
def test_no_folder_where_the_generations_were(kind: str, root: Path) -> None:
    whole = Snapshot.of(root)
    folder = root / "repo" / ".ckpt" / "refs" / "heads" / "main"
    shutil.rmtree(folder)
    if kind == "a file":
        folder.write_text("main")
    else:
        folder.symlink_to("main" if "itself" in kind else "nowhere")
    assert damage(root) == ["ref"]
    Repo.open(root / "repo").repair(drop=True)
    assert not damage(root)
    assert Snapshot.of(root) == whole


def test_a_number_that_nobody_got_to(root: Path) -> None:
    newest = generations(root, "heads/main")[-1]
    shutil.copy(newest, newest.with_name("9" * 16))
    assert damage(root) == ["ref"]
    Repo.open(root / "repo").repair(drop=True)
    assert damage(root) in ([], ["ref"])


def test_the_repository_itself_may_be_a_link(root: Path) -> None:
    store = root / "repo" / ".ckpt"
    store.rename(root / "elsewhere")
    store.symlink_to(root / "elsewhere")
    _flip(generations(root, "heads/main")[-1])
    Repo.open(root / "repo").repair()
    assert store.is_symlink()
    assert not damage(root)


# -- what repairs must not do ----------------------------------------------------------------------


def test_without_head_nothing_goes_on(root: Path) -> None:
    """To take a repository for an empty one would be to sweep it."""
    whole, store = Snapshot.of(root), root / "repo" / ".ckpt"
    for lost in ("refs/HEAD", "refs"):
        here = root.parent / lost.replace("/", "-")
        shutil.copytree(root, here)
        without_cache(here)
        shutil.rmtree(here / "repo" / ".ckpt" / lost)
        assert "ref" in damage(here)
        for use in (
            Repo.gc,
            Repo.log,
            lambda repo: repo.commit_path(root / "step-5.pt", message=""),
        ):
            with pytest.raises(CorruptionError):
                use(Repo.open(here / "repo"))
        done = Repo.open(here / "repo").repair()
        assert not damage(here)
        assert Snapshot.of(here).near.keys() == whole.near.keys()
        if lost == "refs":  # a branch for each line, whose names are lost
            assert [ref for ref in done.refs if "found" in ref] == ["heads/found-1"]
    assert store.exists()


def test_branches_that_are_gone_whole_are_missed(root: Path) -> None:
    whole = Snapshot.of(root)
    without_cache(root)
    shutil.rmtree(root / "repo" / ".ckpt" / "refs" / "heads")
    shutil.rmtree(root / "repo" / ".ckpt" / "refs" / "tags")
    shutil.rmtree(root / "repo" / ".ckpt" / "refs" / "pins")
    assert "ref" in damage(root)
    with pytest.raises(CorruptionError, match="ref"):
        Repo.open(root / "repo").gc()
    Repo.open(root / "repo").repair()
    assert not damage(root)
    assert Snapshot.of(root).near.keys() == whole.near.keys()


def test_what_was_taken_back_in_a_copy_is_not_taken_back_here(template: Path, root: Path) -> None:
    other = root.parent / "other"
    shutil.copytree(template, other)
    Repo.open(other / "repo").undo()
    made = Repo.open(root / "repo").commit_path(root / "step-5.pt", message="on")
    _flip(generations(root, "heads/main")[-1])
    without_cache(root)
    done = Repo.open(root / "repo").repair(other / "repo")
    assert done.inferred == {"heads/main": made.id}
    assert Repo.open(root / "repo").resolve("main") == made.id


def test_what_was_taken_back_here_stays_so(root: Path) -> None:
    Repo.open(root / "repo").undo()
    other = root.parent / "other"
    shutil.copytree(root, other)
    whole = Snapshot.of(root)
    _flip(generations(root, "heads/main")[-1])
    without_cache(root)
    Repo.open(root / "repo").repair(other / "repo")
    assert Snapshot.of(root) == whole


def test_a_copy_gives_everything_back(template: Path, root: Path) -> None:
    whole = Snapshot.of(root)
    for lost in (("refs", "packs", "meta", "cache"), ("meta", "cache"), ("refs", "meta", "cache")):
        here = root.parent / "-".join(lost)
        shutil.copytree(root, here)
        for folder in lost:
            shutil.rmtree(here / "repo" / ".ckpt" / folder)
        if "refs" not in lost:
            _flip(generations(here, "heads/main")[-1])
        Repo.repair_at(here / "repo", template / "repo")
        assert not damage(here)
        assert Snapshot.of(here) == whole


def test_nothing_is_made_up_of_what_only_a_copy_has(template: Path, root: Path) -> None:
    other = root.parent / "other"
    shutil.copytree(template, other)
    theirs = Repo.open(other / "repo")
    set_ref(handle(theirs), "heads", "own", theirs.resolve(1), "branch")
    theirs.commit_path(other / "step-5.pt", message="theirs", branch="own")
    at = theirs.resolve("own")
    done = Repo.open(root / "repo").repair(other / "repo")
    assert done.inferred == {"heads/own": at}  # as it is there, and said
    assert not damage(root)


def test_each_branch_gets_its_own_commits(root: Path) -> None:
    repo = Repo.open(root / "repo")
    set_ref(handle(repo), "heads", "low", repo.resolve(2), "branch")
    mine = {
        "heads/low": repo.commit_path(root / "step-4.pt", message="low", branch="low").id,
        "heads/main": repo.commit_path(root / "step-5.pt", message="main").id,
    }
    without_cache(root)
    for ref in mine:
        _flip(generations(root, ref)[-1])
    assert Repo.open(root / "repo").repair().inferred == mine
    assert not Repo.open(root / "repo").verify().unreachable


def test_a_repository_of_another_history_gives_no_settings(root: Path) -> None:
    other = Repo.init(root / "other")
    other.configure("keep-exact", "0")
    own = (root / "repo" / ".ckpt" / "config.toml").read_text()
    (root / "repo" / ".ckpt" / "config.toml").write_text(own + "keep-all = 1\n")
    (root / "repo" / ".ckpt" / "format").unlink()
    assert Repo.repair_at(root / "repo", root / "other").files == ["format"]
    assert damage(root) == ["settings"]


@pytest.mark.parametrize("text", ["", " \n", 'codec = "near"\nkeep-exact = 5\nkeep-exact = 3\n'])
def test_settings_that_say_nothing_or_too_much(text: str, root: Path) -> None:
    (root / "repo" / ".ckpt" / "config.toml").write_text(text)
    assert damage(root) == ["settings"]
    Repo.open(root / "repo").repair(drop=True)
    assert not damage(root)


def test_settings_that_are_a_pipe(root: Path) -> None:
    (root / "repo" / ".ckpt" / "config.toml").unlink()
    os.mkfifo(root / "repo" / ".ckpt" / "config.toml")
    assert damage(root) == ["settings"]
    Repo.open(root / "repo").repair(drop=True)
    assert not damage(root)


@pytest.mark.parametrize("name", ["packs", "meta", "leases", "marks", "tmp"])
def test_files_where_folders_were(name: str, template: Path, root: Path) -> None:
    whole = Snapshot.of(root)
    shutil.rmtree(root / "repo" / ".ckpt" / name)
    (root / "repo" / ".ckpt" / name).write_bytes(b"")
    assert "folder" in damage(root)
    Repo.repair_at(root / "repo", template / "repo")
    assert not damage(root)
    assert Snapshot.of(root) == whole


def test_a_patch_whose_frames_are_lost_is_let_go_once(root: Path) -> None:
    store = root / "repo" / ".ckpt"
    for patch in handle(Repo.open(root / "repo")).fader().patches():
        here = root.parent / patch.pack[:8]
        shutil.copytree(root, here)
        (here / "repo" / ".ckpt" / patch.folder / patch.pack[:2] / f"{patch.pack}.pack").unlink()
        Repo.open(here / "repo").repair(drop=True)
        assert not damage(here)
        packs = len(handle(Repo.open(here / "repo")).catalog.store.list_packs())
        Repo.open(here / "repo").repair(drop=True)
        assert len(handle(Repo.open(here / "repo")).catalog.store.list_packs()) == packs
        Repo.open(here / "repo").gc()
        assert not damage(here)
    assert store.exists()


def test_an_empty_folder_in_the_place_of_a_generation(root: Path) -> None:
    newest = generations(root, "heads/main")[-1]
    _folder(newest)
    without_cache(root)
    assert damage(root) == ["ref"]
    Repo.open(root / "repo").repair()
    assert not damage(root)


def test_a_patch_in_a_pack_that_grew_is_saved(root: Path) -> None:
    whole = Snapshot.of(root)
    for patch in handle(Repo.open(root / "repo")).fader().patches():
        pack = root / "repo" / ".ckpt" / patch.folder / patch.pack[:2] / f"{patch.pack}.pack"
        pack.write_bytes(pack.read_bytes() + b"more")
    without_cache(root)
    Repo.open(root / "repo").repair(drop=True)
    assert not damage(root)
    assert Snapshot.of(root) == whole
