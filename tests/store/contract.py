"""What every backend promises; each backend's tests subclass this."""

from __future__ import annotations

import pytest

from ckptvcs.errors import ConflictError
from ckptvcs.store.backend import Backend, write_once


class BackendContract:
    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    def test_a_file_is_invisible_until_published(self, backend: Backend) -> None:
        writer = backend.writer()
        writer.write(b"hello ")
        assert list(backend.names("packs")) == []
        writer.write(b"world")
        writer.publish("packs/ab/one")
        assert list(backend.names("packs")) == ["packs/ab/one"]
        assert backend.read("packs/ab/one") == b"hello world"
        assert backend.size("packs/ab/one") == 11

    def test_ranges(self, backend: Backend) -> None:
        write_once(backend, "meta/x", b"0123456789")
        assert backend.read("meta/x", 2, 3) == b"234"
        assert backend.read("meta/x", 8) == b"89"
        assert backend.read("meta/x", 8, 100) == b"89"
        assert backend.read("meta/x", 100, 5) == b""

    def test_a_name_is_taken_once(self, backend: Backend) -> None:
        write_once(backend, "refs/HEAD/1", b"first")
        with pytest.raises(ConflictError):
            write_once(backend, "refs/HEAD/1", b"second")
        assert backend.read("refs/HEAD/1") == b"first"
        assert list(backend.names("tmp")) == []

    def test_abort_leaves_nothing(self, backend: Backend) -> None:
        writer = backend.writer()
        writer.write(b"x" * 100_000)
        writer.abort()
        writer.abort()
        assert list(backend.names("tmp")) == []

    def test_what_is_not_there(self, backend: Backend) -> None:
        with pytest.raises(FileNotFoundError):
            backend.read("packs/none")
        with pytest.raises(FileNotFoundError):
            backend.size("packs/none")
        assert list(backend.names("nowhere")) == []
        backend.delete("packs/none")

    def test_delete(self, backend: Backend) -> None:
        write_once(backend, "leases/a", b"1")
        backend.delete("leases/a")
        assert list(backend.names("leases")) == []
