"""Open a checkpoint: parse its files into pieces, and give each tensor its role.

path or state  ->  files, each a list of pieces  +  tensors with part, role and pair
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from ckptvcs.checkpoint import conventions, distcp, safetensors, torch_legacy, torch_zip
from ckptvcs.checkpoint.intact import require_whole
from ckptvcs.checkpoint.layout import (
    FileSource,
    Layout,
    Piece,
    Source,
    StoredTensor,
    changed_while_read,
    covers,
    pieces,
    unreadable,
)
from ckptvcs.checkpoint.links import follow
from ckptvcs.checkpoint.links import notes as links_notes
from ckptvcs.checkpoint.notes import notes, why_raw
from ckptvcs.checkpoint.optimizer_state import Names, Rule
from ckptvcs.checkpoint.roles import OTHER, Role, assign_roles
from ckptvcs.errors import CkptError, InvalidInputError, NotFoundError
from ckptvcs.files.names import MAX_NESTING, is_repository_name, listed, trusted_names
from ckptvcs.history.schema import LITTLE, Schema, TensorInfo
from ckptvcs.store.disk import real_path

_DOUBTFUL = ("raw", "torch-zip")  # a zip file can lack records that its directory lists
_MAX_STATE_BYTES = 1 << 26  # of a JSON file that may hold the step
_MAX_NAME_BYTES = 64  # of a text file that may hold the step
_MAX_OPEN_FILES = 16


@dataclass(frozen=True)
class InputFile:
    """A file and its pieces, which number tensors by their position in the schema."""

    path: str
    source: Source
    format: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class InputLink:
    """A directory (`target` is None) or a symbolic link."""

    path: str
    target: str | None
    mode: int
    mtime_ns: int


@dataclass(frozen=True)
class Checkpoint:
    """Files and the tensors in them.

    kind        `file`, `directory` or `state`
    places      file number and byte offset of each tensor of `schema`
    step, epoch the numbers that the checkpoint itself holds
    rules       the optimizer's rule for each moment, by position in the schema
    parameters  position of a moment -> number that all moments of its parameter share
    directory   the listed directory, and the path that was skipped in it
    followed    path of a followed link -> the file that it leads to
    notes       lines about files that were not fully understood
    is_all      whether it is the whole file or directory at its path
    """

    kind: str
    files: tuple[InputFile, ...]
    links: tuple[InputLink, ...]
    schema: Schema
    places: tuple[tuple[int, int], ...]
    step: int | None
    rules: Mapping[int, Rule]
    parameters: Mapping[int, int]
    directory: tuple[Path, Path | None] | None = None
    followed: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    epoch: int | None = None
    is_all: bool = True

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Open each file once for all reads, unless there are many."""
        with ExitStack() as opened:
            if len(self.files) <= _MAX_OPEN_FILES:
                for source in (file.source for file in self.files):
                    if isinstance(source, FileSource):
                        with suppress(CkptError):  # the first read raises it again
                            opened.enter_context(source)
            yield

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.source.size for file in self.files)

    def check_unchanged(self) -> None:
        """Check that the checkpoint is the same as when it was opened.

        Raises:
            InvalidInputError: a file was written, added or deleted, or a tensor of the state has
                changed.
        """
        for file in self.files:
            file.source.check_unchanged()
        if self.directory is None:
            return
        root, skip = self.directory
        before: dict[str, str | None] = {file.path: _FILE for file in self.files}
        before |= {link.path: link.target for link in self.links}
        if before != {name: self._kind(name, entry) for name, entry in list_entries(root, skip)}:
            raise changed_while_read(root)

    def _kind(self, name: str, entry: os.DirEntry[str]) -> str | None:
        """Return _FILE for a file, None for a directory, else the target of a link."""
        if not entry.is_symlink():
            return None if entry.is_dir(follow_symlinks=False) else _FILE
        try:
            if name in self.followed:
                real = os.path.realpath(entry.path, strict=True)
                return _FILE if real == str(self.followed[name]) else ""
            return str(Path(entry.path).readlink())
        except OSError:
            return ""


def open_checkpoint(
    path: Path,
    *,
    raw: bool = False,
    skip: Path | None = None,
    names: Names | None = None,
    only: Collection[str] = (),
) -> Checkpoint:
    """Read the structure of a file, or of the files of a directory.

    Args:
        path: file or directory
        raw: store the bytes without parsing them
        skip: path in the directory to leave out
        names: see `build`
        only: the files of the directory to read (default: all)

    Raises:
        NotFoundError: `path` does not exist.
        InvalidInputError: it is empty, incomplete or unreadable, or has another format than its
            suffix says.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise NotFoundError(f"no such file or directory: {path}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        return _open_directory(path, raw, skip, names, only)
    if not stat.S_ISREG(mode):
        raise InvalidInputError(f"{path} is neither a file nor a directory")
    source = FileSource(path)
    with source:
        layout = _parse(source, raw)
        if not raw and layout.format in _DOUBTFUL:
            require_whole(source, str(path), alone=True)
        return build("file", [(path.name, source, layout)], [], names)


def _parse(source: Source, raw: bool) -> Layout:
    """Return the layout of a file; format `raw` if no parser accepts it."""
    layout = None
    if not raw and source.size:
        if torch_zip.starts_like_zip(source):
            layout = torch_zip.parse(source)
        else:
            layout = safetensors.parse(source) or torch_legacy.parse(source)
    if layout is not None and covers(layout, source.size):
        return layout
    return Layout("raw", [], problem=None if raw or not source.size else why_raw(source))


def list_entries(root: Path, skip: Path | None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the path below `root` and the entry of each file and folder, except `skip`."""
    stack = _sorted(root, "")
    while stack:
        name, entry = stack.pop()
        if name.count("/") >= MAX_NESTING:
            raise InvalidInputError(f"{root} nests more than {MAX_NESTING} directories")
        if entry.name.lower() == ".ckpt" or (skip and real_path(Path(entry.path)) == skip):
            continue
        if is_repository_name(entry.name):
            raise InvalidInputError(
                f"other file systems take {entry.path!r} for a ckpt repository", hint="rename it"
            )
        yield name, entry
        if entry.is_dir(follow_symlinks=False):
            stack += _sorted(root, name)


def _sorted(root: Path, below: str) -> list[tuple[str, os.DirEntry[str]]]:
    """Return the entries of a directory in reverse order of their names."""
    try:
        with os.scandir(root / below) as listing:
            entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise unreadable(root / below, error) from error
    return [(f"{below}/{entry.name}" if below else entry.name, entry) for entry in entries]


def _open_directory(
    root: Path, raw: bool, skip: Path | None, names: Names | None, only: Collection[str]
) -> Checkpoint:
    reader = _DirectoryReader(root, raw, skip, only)
    for name, entry in list_entries(root, skip):
        if not only or name in only:
            reader.take(name, entry)
    files = {name for name, *_ in reader.parsed}
    is_sharded = not raw and _is_sharded(root, files)
    unfollowed = [link.path for link in reader.links if link.target is not None]
    hidden = tuple(links_notes(unfollowed, reader.real, skip))
    if not files and hidden:
        raise InvalidInputError(
            f"{root} contains no files except {hidden[0]}",
            hint=f"commit a copy without links: cp -rL {root} COPY",
        )
    if not files:
        raise InvalidInputError(f"{root} contains no files")
    parsed = distcp.with_structure(reader.parsed) if is_sharded else reader.parsed
    checkpoint = build("directory", parsed, reader.links, names)
    trusted = _trusted([*files, *(link.path for link in reader.links)])
    all_notes = (*checkpoint.notes, *hidden, *trusted)
    if not only:
        return replace(
            checkpoint, directory=(root, skip), followed=reader.followed, notes=all_notes
        )
    if missing := set(only) - files:
        raise NotFoundError(f"no such file: {root / min(missing)}")
    return replace(checkpoint, is_all=False, notes=all_notes)


class _DirectoryReader:
    """Reads the entries of a directory: files, links, and the files that links lead to."""

    def __init__(self, root: Path, raw: bool, skip: Path | None, only: Collection[str]) -> None:
        self.parsed: list[distcp.Parsed] = []
        self.links: list[InputLink] = []
        self.followed: dict[str, Path] = {}
        self.real = real_path(root)
        self._root, self._raw, self._skip = root, raw, skip
        # With `only`, the caller reports truncated files itself.
        self._doubtful = _DOUBTFUL[1:] if only else _DOUBTFUL

    def take(self, name: str, entry: os.DirEntry[str]) -> None:
        """Read the entry at the relative path `name`."""
        if entry.name == conventions.INCOMPLETE and not self._raw:
            raise InvalidInputError(f"{self._root} is incomplete: it contains {entry.name}")
        path = Path(entry.path)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            raise unreadable(path, error) from error
        is_link = entry.is_symlink()
        target = follow(name, self.real, self._skip) if is_link else None
        if target is not None:
            self.followed[name] = target.path
            source = FileSource(path, at=target.path, then=target.status)
            self._parse(name, entry.path, source)
        elif is_link:
            self.links.append(InputLink(name, str(path.readlink()), 0o777, status.st_mtime_ns))
        elif entry.is_dir(follow_symlinks=False):
            mode = stat.S_IMODE(status.st_mode)
            self.links.append(InputLink(name, None, mode, status.st_mtime_ns))
        elif entry.is_file(follow_symlinks=False):
            self._parse(name, entry.path, FileSource(path, at=path))
        else:
            raise InvalidInputError(f"{entry.path} is neither a file nor a directory")

    def _parse(self, name: str, shown: str, source: FileSource) -> None:
        with source:
            plain = self._raw or name.endswith(conventions.SHARD_SUFFIX)
            layout = _parse(source, plain)
            if not plain and layout.format in self._doubtful:
                require_whole(source, shown, alone=False)
            self.parsed.append((name, source, layout))


def _is_sharded(root: Path, files: Collection[str]) -> bool:
    """Return whether some files are shards of `torch.distributed.checkpoint`.

    Raises:
        InvalidInputError: the file `.metadata` is missing.
    """
    if not any(name.endswith(conventions.SHARD_SUFFIX) for name in files):
        return False
    if not any(name.rpartition("/")[2] == distcp.METADATA for name in files):
        raise InvalidInputError(
            f"{root} is incomplete: it contains shards, but no .metadata",
            hint="commit it again once it is complete",
        )
    return True


def _trusted(paths: Sequence[str]) -> Iterator[str]:
    """Yield a note about file names that a checkout does not write without --force."""
    if trusted := trusted_names(sorted(paths)):
        yield (
            f"{listed(trusted)}: tools execute or trust files of this name; "
            "a checkout writes them only with --force"
        )


def build(
    kind: str,
    parsed: Sequence[tuple[str, Source, Layout]],
    links: Sequence[InputLink],
    names: Names | None = None,
) -> Checkpoint:
    """Join parsed files (path, bytes, layout) into a checkpoint with one schema.

    `names` gives the parameter names of its modules and optimizers, if the caller knows them.
    """
    files: list[InputFile] = []
    numbers: dict[StoredTensor, int] = {}
    for path, source, layout in parsed:
        row = tuple(pieces(layout, source.size, len(numbers)))
        files.append(InputFile(path, source, layout.format, row))
        numbers |= zip(layout.tensors, count(len(numbers)), strict=False)
    roles = assign_roles([(path, layout) for path, _, layout in parsed], names or {})
    infos: list[TensorInfo] = []
    places: list[tuple[int, int]] = []
    rules: dict[int, Rule] = {}
    parameters: dict[int, int] = {}
    for file_number, (path, _, layout) in enumerate(parsed):
        prefix = f"{path}:" if kind == "directory" else ""
        for tensor, assigned in zip(layout.tensors, roles[file_number], strict=True):
            # The lossy codecs read little-endian words only.
            role = assigned if tensor.order == LITTLE else Role(assigned.part, OTHER)
            infos.append(_info(prefix, tensor, role, numbers))
            if role.rule is not None:
                rules[len(places)] = role.rule
                parameters[len(places)] = role.parameter
            places.append((file_number, tensor.offset))
    return Checkpoint(
        kind,
        tuple(files),
        tuple(links),
        Schema(tuple(infos)),
        tuple(places),
        _find_step(parsed),
        rules,
        parameters,
        epoch=_find_epoch(parsed),
        notes=tuple(notes(parsed)),
    )


def _info(
    prefix: str, tensor: StoredTensor, role: Role, numbers: Mapping[StoredTensor, int]
) -> TensorInfo:
    """Return the schema entry of a tensor; `numbers` are the positions of all tensors."""
    pair = role.pair if role.pair is not None and role.pair.order == LITTLE else None
    return TensorInfo(
        prefix + tensor.name + tensor.part,
        tensor.dtype,
        tensor.shape,
        role.part,
        role.role,
        tensor.inline,
        None if pair is None else numbers[pair],
        tuple(tensor.views),
        role.evidence,
        tensor.order,
    )


_FILE = "/"  # stands for a file beside the targets of links; no link has this target


def _find_step(parsed: Sequence[tuple[str, Source, Layout]]) -> int | None:
    """Return the step from a key at the top of a file, or from a file of the trainer."""
    for path, source, layout in parsed:
        step = _step_beside(path, source)
        if step is None and conventions.may_hold_step(path):
            step = conventions.step_in_keys(layout.tree)
        if step is not None:
            return step
    return None


def _find_epoch(parsed: Sequence[tuple[str, Source, Layout]]) -> int | None:
    """Return the epoch from a key at the top of a file."""
    epochs = (
        conventions.epoch_in_keys(layout.tree)
        for path, _, layout in parsed
        if conventions.may_hold_step(path)
    )
    return next((epoch for epoch in epochs if epoch is not None), None)


def _step_beside(path: str, source: Source) -> int | None:
    """Return the step from a JSON or text file beside the tensors."""
    key = conventions.step_key_of(path)
    if key is not None:
        whole = source.size < _MAX_STATE_BYTES
        return _json_step(source.read(0, source.size), key) if whole else None
    if not conventions.is_step_file(path) or source.size > _MAX_NAME_BYTES:
        return None
    text = source.read(0, source.size).decode("ascii", "replace").strip()
    step = int(text) if text.isdecimal() else conventions.named_step(text)
    return step if conventions.is_count(step) else None


def _json_step(data: bytes, key: str) -> int | None:
    import json  # noqa: PLC0415  only some directories need it

    try:
        value = json.loads(data).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
    return value if conventions.is_count(value) else None
