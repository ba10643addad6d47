"""Create, move and delete branches, tags, pins and HEAD; list and undo their moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptvcs.errors import ConflictError, NotFoundError
from ckptvcs.history.canonical_json import now
from ckptvcs.history.format_file import raise_flags
from ckptvcs.history.log import LogEntry
from ckptvcs.history.reflog import Past, ReflogEvent, Undone
from ckptvcs.history.refs import HEAD, check_name
from ckptvcs.ops.repository import Repository
from ckptvcs.store.ids import ObjectId


@dataclass(frozen=True)
class NamedCommit:
    """A branch or a tag.

    Attributes:
        name: The name of the branch or tag.
        commit: The id of its commit.
        step: The training step of the commit, if known.
        current: Whether HEAD follows the branch.
    """

    name: str
    commit: ObjectId
    step: int | None
    current: bool = False


@dataclass(frozen=True)
class DeletedBranch:
    """A deleted branch.

    Attributes:
        name: The name of the branch.
        commit: The commit that it pointed to.
        unnamed: The commits that no other ref reaches, newest first; the next gc deletes them.
    """

    name: str
    commit: ObjectId
    unnamed: tuple[ObjectId, ...]


def branches(repository: Repository) -> list[NamedCommit]:
    """Return the branches that point to a commit, sorted by name."""
    head = repository.head()
    current = head.branch if head else None
    return _named(repository, "heads", repository.revisions.branch, current)


def tags(repository: Repository) -> list[NamedCommit]:
    """Return the tags, sorted by name."""
    return _named(repository, "tags", repository.revisions.tag, None)


def _named(
    repository: Repository, space: str, read: Callable[[str], ObjectId | None], current: str | None
) -> list[NamedCommit]:
    return [
        NamedCommit(name, commit, repository.catalog.commit(commit).step, name == current)
        for name in repository.refs.names(space)
        if (commit := read(name)) is not None
    ]


def create_branch(repository: Repository, name: str, revision: str | int) -> ObjectId:
    """Create a branch, and return the id of its commit; see `Repo.branch`."""
    if repository.revisions.branch(name) is not None:
        raise ConflictError(f"branch '{name}' exists")
    commit = repository.resolve(revision)
    set_ref(repository, "heads", name, commit, "branch")
    return commit


def rename_branch(repository: Repository, old: str | None, new: str) -> str:
    """Rename a branch; see `Repo.rename_branch`.

    The new branch is published first, then HEAD, then the deletion of the old one.  After a crash
    between them both branches exist.
    """
    head = repository.refs.read(HEAD)
    following = head.branch if head is not None else "main"
    name = following if old is None else old
    if name is None:
        raise NotFoundError("HEAD is detached", hint="pass the old and the new name")
    check_name(new, "branch")
    tip = repository.revisions.branch(name)
    if tip is None and name != following:
        raise NotFoundError(f"no branch '{name}'", hint="see 'ckpt branch'")
    if repository.revisions.branch(new) is not None:
        raise ConflictError(f"branch '{new}' exists")
    if tip is not None:
        set_ref(repository, "heads", new, tip, f"rename {name}")
    if following == name:
        repository.refs.publish(HEAD, head, commit=None, branch=new, time=now(), action="rename")
    if tip is not None:
        set_ref(repository, "heads", name, None, f"rename to {new}")
    return name


def delete_branch(repository: Repository, name: str) -> DeletedBranch:
    """Delete a branch; see `Repo.delete_branch`."""
    tip, head = repository.revisions.branch(name), repository.head()
    if tip is None:
        raise NotFoundError(f"no branch '{name}'", hint="see 'ckpt branch'")
    if head is not None and head.branch == name:
        raise ConflictError(f"HEAD is on branch '{name}'", hint="check out another branch first")
    set_ref(repository, "heads", name, None, "delete")
    return DeletedBranch(name, tip, tuple(repository.history.unnamed(tip)))


def create_tag(repository: Repository, name: str, revision: str | int) -> ObjectId:
    """Create a tag, and return the id of its commit; see `Repo.tag`."""
    if repository.revisions.tag(name) is not None:
        raise ConflictError(
            f"tag '{name}' exists", hint=f"delete it first with 'ckpt tag --delete {name}'"
        )
    commit = repository.resolve(revision)
    set_ref(repository, "tags", name, commit, "tag")
    return commit


def delete_tag(repository: Repository, name: str) -> ObjectId:
    """Delete a tag, and return the id of its commit; see `Repo.delete_tag`."""
    commit = repository.revisions.tag(name)
    if commit is None:
        raise NotFoundError(f"no tag '{name}'")
    set_ref(repository, "tags", name, None, "delete")
    return commit


def pins(repository: Repository) -> list[LogEntry]:
    """Return the pinned commits, newest first."""
    entries = [repository.entry(name) for name in repository.refs.targets("pins")]
    return sorted(entries, key=lambda entry: (entry.commit.time, entry.id), reverse=True)


def move_head(repository: Repository, name: ObjectId, branch: str | None) -> str | None:
    """Point HEAD to a commit, or to a branch whose newest commit it is; return that branch.

    `branch` is preferred, then the branch that HEAD follows, then any other.
    """
    refs = repository.refs
    head = refs.read(HEAD)
    branches = [n for n in refs.names("heads") if repository.revisions.branch(n) == name]
    following = head.branch if head else None
    if branch not in branches:
        branch = following if following in branches else next(iter(branches), None)
    commit = None if branch else name
    if head is None or (head.branch, head.commit) != (branch, commit):
        with repository.leading_to(name):
            refs.publish(HEAD, head, commit=commit, branch=branch, time=now(), action="checkout")
    return branch


def set_ref(
    repository: Repository, space: str, name: str, commit: ObjectId | None, action: str
) -> None:
    """Create or move a branch (`heads`) or a tag (`tags`); None deletes it.

    Raises:
        InvalidInputError: The name is not valid.
        NotFoundError: The commit was dropped or deleted.
    """
    check_name(name, "tag" if space == "tags" else "branch")
    ref, refs = f"{space}/{name}", repository.refs
    with repository.leading_to(commit):
        refs.publish(ref, refs.read(ref), commit=commit, time=now(), action=action)


def set_pin(repository: Repository, name: ObjectId, *, pinned: bool) -> bool:
    """Pin or unpin a commit, and return whether the pin changed; see `Repo.pin`."""
    ref, refs = f"pins/{name}", repository.refs
    if (refs.target(ref) is not None) != pinned:
        raise_flags(repository.backend, "gc", "pins")
    with repository.leading_to(name if pinned else None):
        old = refs.read(ref)
        if pinned == (old is not None and old.commit is not None):
            return False
        action, commit = ("pin", name) if pinned else ("unpin", None)
        refs.publish(ref, old, commit=commit, time=now(), action=action)
    return True


def events(repository: Repository, branch: str | None) -> list[ReflogEvent]:
    """Return the reflog of a branch, newest first; see `Repo.reflog`."""
    return Past(repository.catalog, repository.refs).events(branch)


def undo(repository: Repository) -> Undone:
    """Undo the last move of HEAD's branch, or the last drop; see `Repo.undo`."""
    with repository.leading_to(None):
        return Past(repository.catalog, repository.refs).undo(now())
