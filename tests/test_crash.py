"""Stop a commit at every write: the old state is whole, the next try works, gc sweeps the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptvcs.errors import StorageError
from ckptvcs.repo import Repo
from ckptvcs.store.local import LocalBackend, LocalWriter
from tests.training import save_run, train


class Stopped(BaseException):
    """The process ends here: nothing that handles errors may handle this."""


class Cut:
    """Counts what is written, and stops at the n-th write or publish."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], BaseException]
    ) -> None:
        self.calls = 0
        self.at: int | None = None
        self._failure = failure
        cuts = ((LocalWriter, "write"), (LocalWriter, "publish"), (LocalBackend, "delete"))
        for owner, name in cuts:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, calm: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self._failure()
            return calm(*args)

        return call


FAILURES = {"stop": Stopped, "full disk": lambda: StorageError("cannot write: no space left")}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("codec", ["lossless", "excp"])
def test_a_commit_that_is_cut(
    failure: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = save_run(tmp_path, train(3))
    repo = Repo.init(tmp_path / "repo")
    repo.commit_path(first, message="one", codec=codec)
    cut = Cut(monkeypatch, FAILURES[failure])  # type: ignore[arg-type]
    repo.commit_path(second, message="two", codec=codec)
    total = cut.calls
    assert total > 10
    before = repo.log()
    kept = {e.id: content(repo, e.id, tmp_path) for e in before}
    at, went_through = 1, False
    while not went_through:
        cut.calls, cut.at = 0, at
        try:
            Repo.open(tmp_path / "repo").commit_path(third, message="three", codec=codec)
            went_through = True  # there are fewer writes than `at`
        except (Stopped, StorageError):
            pass
        cut.at = None
        again = Repo.open(tmp_path / "repo")
        found = [e.id for e in again.log()]
        if len(found) > len(before):  # cut behind the commit point
            assert found[1:] == [e.id for e in before]
            head = again.refs.read("heads/main")
            again.refs.publish("heads/main", head, commit=before[0].id, time="t", action="test")
        else:
            assert found == [e.id for e in before]
        assert {e.id: content(again, e.id, tmp_path) for e in before} == kept
        at += 3
    assert at > 10  # a patch that was finished by one try is used by the next
    last = Repo.open(tmp_path / "repo")
    for lease in (tmp_path / "repo" / ".ckpt" / "leases").iterdir():
        lease.unlink()  # this process is alive, so its leases count; a dead one's would not
    last.gc()
    assert not list((tmp_path / "repo" / ".ckpt" / "tmp").iterdir())
    assert not last.verify().damage
    result = last.commit_path(third, message="three", codec=codec)
    assert not last.verify().damage
    assert last.revisions.head() == result.id


def content(repo: Repo, name: Any, tmp_path: Path) -> bytes:
    repo.checkout_files(name, tmp_path / "x", force=True)
    return (tmp_path / "x").read_bytes()
