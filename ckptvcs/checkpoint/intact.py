"""Check that a file with a suffix of weights is complete, although no parser reads it.

A truncated file would be stored exactly, as bytes, and nobody would notice for years.  Complete
files that torch wrote in another form (TorchScript archives, tar files, plain pickles) are
accepted.  Any other file with such a suffix is refused, except in a directory, where a `.bin` may
be anything.
"""

from __future__ import annotations

import pickle
import pickletools

from ckptvcs.checkpoint import torch_legacy, torch_zip
from ckptvcs.checkpoint.conventions import SAFETENSORS_SUFFIX, SUFFIXES, TORCH_SUFFIXES
from ckptvcs.checkpoint.layout import Source
from ckptvcs.checkpoint.pickle_reader import read_pickle
from ckptvcs.errors import InvalidInputError

HINT = "commit it with --raw to store the bytes as they are"
_SCANNED = 1 << 22  # bytes of the largest pickle that is scanned; others are checked at both ends
_BLOCK = 512  # of a tar file
_MEMBERS = 100_000
_RARE = (".th", ".pyth", ".torch")
_TAR = (".pt.tar", ".pth.tar")  # which torch.save writes as it does any other file


def require_whole(source: Source, name: str, *, alone: bool) -> None:
    """Check that a file without a parser may be stored as bytes.

    A file that is `alone` is not part of a directory.

    Raises:
        InvalidInputError: The file is cut off or damaged; or it is alone and not what its suffix
            says.
    """
    suffix = name[name.rfind(".") :].lower()
    if not alone and suffix not in SUFFIXES:
        return
    if suffix in _RARE or name.lower().endswith(_TAR):
        suffix = TORCH_SUFFIXES[0]
    problem = _problem(source, suffix, alone=alone)
    if problem is not None:
        raise InvalidInputError(f"{name} is {problem}", hint=HINT)


def _problem(source: Source, suffix: str, *, alone: bool) -> str | None:
    if not source.size:
        return "empty"
    if torch_zip.starts_like_zip(source):
        if not torch_zip.has_end(source):
            return "incomplete: it starts like a zip file and has no end"
        if suffix in TORCH_SUFFIXES:
            if alone and not torch_zip.is_of_torch(source):
                return "a zip file that torch did not write"
            return None if torch_zip.is_archive(source) else "a damaged zip file"
    if torch_legacy.is_cut(source):
        return "incomplete: it ends within its tensors"
    if suffix == SAFETENSORS_SUFFIX:
        return "cut off or damaged: its tensors cannot be found"
    if alone and suffix in TORCH_SUFFIXES and not _is_of_torch(source):
        return "cut off or not a torch file: no tensors can be found"
    return None


def _is_of_torch(source: Source) -> bool:
    return torch_legacy.begins_like_one(source) or _is_tar(source) or _is_pickle(source)


def _is_tar(source: Source) -> bool:
    """Return whether a file is a complete tar file, as torch before 0.2 wrote it."""
    if source.size < _BLOCK or source.read(257, 5) != b"ustar":
        return False
    at = 0
    for _ in range(_MEMBERS):
        header = source.read(at, min(_BLOCK, source.size - at))
        if not header.strip(b"\0"):
            return True  # the end mark, or the end of the file
        digits = header[124:136].strip(b"\0 ")
        if header[257:262] != b"ustar" or not digits.isdigit() or digits.strip(b"01234567"):
            return False
        at += _BLOCK + -(-int(digits, 8) // _BLOCK) * _BLOCK
        if at > source.size:
            return False
    return True


def _is_pickle(source: Source) -> bool:
    """Return whether a file is a complete pickle."""
    head = source.read(0, min(2, source.size))
    if head[0] == pickle.PROTO[0] and 2 <= head[-1] <= pickle.HIGHEST_PROTOCOL:
        if source.size > _SCANNED:
            return source.read(source.size - 1, 1) == pickle.STOP
        try:
            for _ in pickletools.genops(source.read(0, source.size)):
                pass
        except Exception:
            return False
        return True
    try:  # protocols 0 and 1 have no magic number: text may look like a pickle
        read_pickle(torch_legacy.stream(source), source.size)
    except pickle.UnpicklingError:
        return False
    return True
