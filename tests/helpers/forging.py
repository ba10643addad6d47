"""Write a repository with forged objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ckptvcs.history.canonical_json import now
from ckptvcs.history.commit import Commit, FileEntry, PartState, dump_commit
from ckptvcs.history.schema import Op, Schema, dump_schema, dump_skeleton
from ckptvcs.ops.history_reader import handle
from ckptvcs.repo import Repo
from ckptvcs.store.ids import Kind, ObjectId


class Forger:
    """Writes whatever objects it is told to, as a pack that is whole."""

    def __init__(self, root: Path) -> None:
        self.repo = Repo.init(root / "repo", codec="lossless")
        path = root / "model.dat"
        path.write_bytes(bytes(range(256)) * 2000)
        self.honest = self.repo.commit_path(path, message="honest", step=1)
        self.commit = self.honest.commit

    def put(self, kind: Kind, content: bytes, region: bytes = b"") -> ObjectId:
        pack = handle(self.repo).catalog.store.new_pack("packs" if kind == Kind.BUNDLE else "meta")
        if region:
            pack.append_region(region)
        name = pack.add(kind, content)
        handle(self.repo).catalog.store.publish(pack)
        return name

    def lead_to(self, commit: Commit) -> ObjectId:
        """Make a commit the newest one."""
        name = self.put(Kind.COMMIT, dump_commit(commit))
        refs = handle(self.repo).refs
        refs.publish("heads/main", refs.read("heads/main"), commit=name, time=now(), action="x")
        return name

    def links(self, *entries: tuple[str, str | None]) -> tuple[FileEntry, ...]:
        """Links, and directories where there is no target."""
        return tuple(
            FileEntry(path, 0, None, 0o700, 1, "link", None, target) for path, target in entries
        )

    def folder(self, *entries: FileEntry) -> ObjectId:
        file = replace(self.commit.files[0], path="file")
        return self.lead_to(
            replace(self.commit, source="directory", files=(file, *entries), path="folder")
        )

    def part(self, schema: Schema, table: bytes, values: Callable[[ObjectId], ObjectId]) -> None:
        """A commit of a part that is forged: `values` makes its recipe."""
        name = self.put(Kind.VALUES, table)
        skeleton = self.put(Kind.SKELETON, dump_skeleton([(Op.TENSOR, 0)], b""))
        values(name)
        self.lead_to(
            replace(
                self.commit,
                schema=self.put(Kind.SCHEMA, dump_schema(schema)),
                parts={"model": PartState(name)},
                files=(replace(self.commit.files[0], skeleton=skeleton),),
            )
        )
