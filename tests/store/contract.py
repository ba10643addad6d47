"""What every backend promises.  The tests of each backend subclass this."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptvcs.errors import ConflictError, CorruptionError
from ckptvcs.store.backend import Backend, Trace, write_once

BLOCK = 1 << 20
ODD_NAMES = (
    *("with space", "-dash", ".hidden", "trailing.", "~", "CASE", "con", "x" * 200),
    *("caf\u00e9", "e\u0301", "\U0001f600", "a%2Fb", "a:b", "'quoted\"", "back\\slash"),
    *("new\nline", "*?[]"),
)


class BackendContract:
    """The tests; a subclass overrides the fixture `backend` with an empty one."""

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError

    # Save and load

    def test_a_file_is_invisible_until_published(self, backend: Backend) -> None:
        writer = backend.writer()
        writer.write(b"hello ")
        assert list(backend.names("packs")) == []
        writer.write(b"world")
        with pytest.raises(FileNotFoundError):
            backend.size("packs/ab/one")
        writer.publish("packs/ab/one")
        assert list(backend.names("packs")) == ["packs/ab/one"]
        assert backend.read("packs/ab/one") == b"hello world"
        assert backend.size("packs/ab/one") == 11

    @pytest.mark.parametrize("size", [0, 1, BLOCK - 1, 5 * BLOCK + 3])
    def test_content_and_size_are_those_written(self, backend: Backend, size: int) -> None:
        content = bytes(range(251)) * (size // 251 + 1)
        content = content[:size]
        writer = backend.writer()
        for start in range(0, size, BLOCK):
            writer.write(memoryview(content)[start : start + BLOCK])
        writer.publish("packs/x")
        assert backend.size("packs/x") == size
        assert backend.read("packs/x") == content

    def test_a_writer_copies_the_buffers_it_is_given(self, backend: Backend) -> None:
        buffer = bytearray(b"before")
        writer = backend.writer()
        writer.write(memoryview(buffer))
        buffer[:] = b"after!"
        writer.write(b"")
        writer.publish("packs/x")
        assert backend.read("packs/x") == b"before"

    def test_open_writers_do_not_mix(self, backend: Backend) -> None:
        writers = [backend.writer() for _ in range(3)]
        for _ in range(4):
            for number, writer in enumerate(writers):
                writer.write(b"%d" % number)
        for number, writer in reversed(list(enumerate(writers))):
            writer.publish(f"meta/{number}")
        assert [backend.read(f"meta/{number}") for number in range(3)] == [
            b"0000",
            b"1111",
            b"2222",
        ]

    # Ranges

    def test_a_range_is_cut_at_the_end_of_the_file(self, backend: Backend) -> None:
        write_once(backend, "meta/x", b"0123456789")
        assert backend.read("meta/x", 2, 3) == b"234"
        assert backend.read("meta/x", 8) == b"89"
        assert backend.read("meta/x", 8, 100) == b"89"
        assert backend.read("meta/x", 10) == b""
        assert backend.read("meta/x", 100, 5) == b""
        assert backend.read("meta/x", 3, 0) == b""

    # Write-once names

    def test_a_name_is_taken_once(self, backend: Backend) -> None:
        write_once(backend, "refs/HEAD/1", b"first")
        with pytest.raises(ConflictError):
            write_once(backend, "refs/HEAD/1", b"second")
        with pytest.raises(ConflictError):
            write_once(backend, "refs/HEAD/1", b"first")
        assert backend.read("refs/HEAD/1") == b"first"
        assert list(backend.names("tmp")) == []

    def test_one_of_many_concurrent_writers_gets_a_name(self, backend: Backend) -> None:
        writers, ready = 8, threading.Barrier(8)

        def write(number: int) -> bool:
            writer = backend.writer()
            writer.write(bytes([number]) * 10_000)
            ready.wait()
            try:
                writer.publish("refs/main/1")
            except ConflictError:
                return False
            finally:
                writer.abort()
            return True

        with ThreadPoolExecutor(writers) as pool:
            (winner,) = [number for number, won in enumerate(pool.map(write, range(8))) if won]
        assert backend.read("refs/main/1") == bytes([winner]) * 10_000
        assert list(backend.names("refs")) == ["refs/main/1"]
        assert list(backend.names("tmp")) == []

    def test_concurrent_writers_of_other_names_all_succeed(self, backend: Backend) -> None:
        def write(number: int) -> None:
            write_once(backend, f"packs/{number % 4}/{number}", b"%d" % number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(100)))
        assert len(set(backend.names("packs"))) == 100
        assert all(backend.read(f"packs/{n % 4}/{n}") == b"%d" % n for n in range(100))

    # Interrupted writes

    def test_an_aborted_write_leaves_nothing(self, backend: Backend) -> None:
        writer = backend.writer()
        writer.write(b"x" * 100_000)
        writer.abort()
        writer.abort()
        assert list(backend.names("tmp")) == []

    def test_an_abort_after_publish_keeps_the_file(self, backend: Backend) -> None:
        writer = backend.writer()
        writer.write(b"content")
        writer.publish("packs/x")
        writer.abort()
        assert backend.read("packs/x") == b"content"

    # Missing files and folders

    def test_a_missing_file_raises_file_not_found(self, backend: Backend) -> None:
        write_once(backend, "packs/there", b"x")
        with pytest.raises(FileNotFoundError):
            backend.read("packs/none")
        with pytest.raises(FileNotFoundError):
            backend.size("packs/none")
        with pytest.raises(FileNotFoundError):
            backend.look("packs/none", 10)
        with pytest.raises(FileNotFoundError):
            backend.settle(["packs/there", "packs/none"])

    def test_a_missing_folder_is_empty(self, backend: Backend) -> None:
        assert list(backend.names("nowhere")) == []

    def test_a_folder_is_not_a_file(self, backend: Backend) -> None:
        write_once(backend, "packs/ab/x", b"x")
        with pytest.raises(CorruptionError):
            backend.read("packs/ab")
        with pytest.raises(CorruptionError):
            backend.size("packs/ab")

    # Listing

    def test_a_folder_lists_the_files_below_it_once_and_no_others(self, backend: Backend) -> None:
        below = {"packs/a", "packs/b/c", "packs/b/d/e"}
        for name in below | {"packs2/a", "pack", "meta/packs/a"}:
            write_once(backend, name, b"x")
        assert sorted(backend.names("packs")) == sorted(below)
        assert sorted(backend.names("packs/b")) == ["packs/b/c", "packs/b/d/e"]

    def test_many_files_are_all_listed(self, backend: Backend) -> None:
        names = [f"packs/{number % 16:x}/{number}" for number in range(500)]
        for name in names:
            write_once(backend, name, name.encode())
        assert sorted(backend.names("packs")) == sorted(names)
        assert all(backend.size(name) == len(name) for name in names)

    def test_files_may_come_and_go_during_a_listing(self, backend: Backend) -> None:
        names = {f"packs/{number}" for number in range(50)}
        for name in names:
            write_once(backend, name, b"x")
        seen = set()
        for name in backend.names("packs"):
            seen.add(name)
            backend.delete(name)
            write_once(backend, name.replace("packs", "meta"), b"x")
        assert seen == names
        assert list(backend.names("packs")) == []

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_odd_names_are_kept_as_they_are(self, backend: Backend, name: str) -> None:
        write_once(backend, f"refs/{name}/1", b"content")
        assert list(backend.names("refs")) == [f"refs/{name}/1"]
        assert backend.read(f"refs/{name}/1") == b"content"
        backend.delete(f"refs/{name}/1")
        assert list(backend.names("refs")) == []

    # Removal

    def test_a_deleted_file_is_gone_and_its_name_is_free(self, backend: Backend) -> None:
        write_once(backend, "leases/a", b"1")
        write_once(backend, "leases/b", b"2")
        backend.delete("leases/a")
        assert list(backend.names("leases")) == ["leases/b"]
        with pytest.raises(FileNotFoundError):
            backend.read("leases/a")
        write_once(backend, "leases/a", b"3")
        assert backend.read("leases/a") == b"3"

    def test_deleting_a_missing_file_does_nothing(self, backend: Backend) -> None:
        backend.delete("packs/none")
        write_once(backend, "packs/x", b"1")
        backend.delete("packs/x")
        backend.delete("packs/x")
        assert list(backend.names("packs")) == []

    # Durability

    def test_settled_files_are_still_there(self, backend: Backend) -> None:
        write_once(backend, "packs/x", b"1")
        write_once(backend, "refs/y", b"2")
        backend.settle(["packs/x", "refs/y"])
        backend.settle([])
        assert backend.read("packs/x") + backend.read("refs/y") == b"12"

    def test_settling_what_was_seen_ignores_deleted_files(self, backend: Backend) -> None:
        write_once(backend, "packs/x", b"1")
        backend.size("packs/x")
        backend.delete("packs/x")
        backend.settle_seen()
        assert list(backend.names("packs")) == []

    # Files that are replaced

    def test_replace_swaps_the_whole_content(self, backend: Backend) -> None:
        write_once(backend, "format", b"a long first version")
        backend.make_folders(["tmp"])
        backend.replace("format", b"second")
        assert backend.read("format") == b"second"
        assert backend.size("format") == 6
        assert list(backend.names("tmp")) == []

    def test_cache_puts_a_file_in_place_of_another(self, backend: Backend) -> None:
        backend.make_folders(["tmp"])
        backend.cache("cache/x", b"first")
        backend.cache("cache/x", b"second")
        assert backend.read("cache/x") == b"second"
        assert list(backend.names("tmp")) == []

    # Leases

    def test_one_holder_holds_a_name_until_it_releases_it(self, backend: Backend) -> None:
        backend.make_folders(["leases"])
        hold = backend.hold("leases/a", lambda trace: b"first")
        with pytest.raises(ConflictError):
            backend.hold("leases/a", lambda trace: b"second")
        hold.renew()
        content, trace = backend.look("leases/a", 100)
        assert content == b"first"
        assert isinstance(trace, Trace)
        hold.release()
        assert list(backend.names("leases")) == []
        backend.hold("leases/a", lambda trace: b"third").release()

    def test_a_file_above_the_limit_is_not_looked_at(self, backend: Backend) -> None:
        write_once(backend, "leases/a", b"12345")
        assert backend.look("leases/a", 5)[0] == b"12345"
        with pytest.raises(CorruptionError):
            backend.look("leases/a", 4)

    # Folders

    def test_folders_are_made_once(self, backend: Backend) -> None:
        backend.make_folders(["packs", "refs/heads"])
        assert backend.make_folders(["packs", "refs/heads"]) == []
        write_once(backend, "refs/heads/main", b"x")
        assert list(backend.names("refs")) == ["refs/heads/main"]

    def test_a_file_in_place_of_a_folder_makes_way(self, backend: Backend) -> None:
        write_once(backend, "leases", b"a file")
        write_once(backend, "meta/x", b"kept")
        backend.make_way("leases")
        backend.make_way("meta")
        write_once(backend, "leases/a", b"1")
        assert list(backend.names("leases")) == ["leases/a"]
        assert backend.read("meta/x") == b"kept"
