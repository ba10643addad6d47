"""What commands say of a repository that needs care, and of what they did."""

from __future__ import annotations

from pathlib import Path

from ckptvcs import Repo
from tests.cli.conftest import Ckpt
from tests.test_background_failures import equal
from tests.test_cached_bases import plain, rekeyed


def test_verify_deletes_a_wrong_base_and_says_so(ckpt: Ckpt, tmp_path: Path) -> None:
    repo = rekeyed(tmp_path)
    true = {entry.step: repo.checkout(entry.step or 0) for entry in repo.log()}
    (path, *others) = sorted((repo.folder / "cache" / "bases").iterdir())
    path.write_bytes(bytes(path.stat().st_size))  # as programs before this one published them
    name = f"cache/bases/{path.name}"
    done = ckpt("verify", cwd=tmp_path)
    assert done.out.endswith("all good\n")
    assert done.err.startswith(f"note: {name} held other values than the history: deleted; ")
    assert not path.exists()
    assert all(other.exists() for other in others)
    assert ckpt("verify", cwd=tmp_path).err == ""
    path.write_bytes(b"")
    found = ckpt("verify", "--json", cwd=tmp_path).json
    assert (found["ok"], found["damage"], found["discarded"]) == (True, [], [name])
    path.write_bytes(bytes(10**5))  # and who reads it without that
    again = Repo.open(tmp_path)
    for step, state in true.items():
        assert equal(plain(again.checkout(step or 0)), plain(state))
