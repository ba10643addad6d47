"""Files that are called weights, and whose structure nobody reads: are they whole?

A file that is cut off would be stored as mere bytes, exactly, and be found out years later.  What
torch itself wrote in a form that is not mapped here (archives of TorchScript, tar files, plain
pickles) is whole; what has a suffix of weights and none of these forms is refused, unless it stands
in a directory, where a `.bin` may be anything.
"""

from __future__ import annotations

import pickle
import pickletools

from ckptvcs.checkpoint import torch_legacy, torch_zip
from ckptvcs.checkpoint.layout import Source
from ckptvcs.checkpoint.pickle_reader import read_pickle
from ckptvcs.errors import InvalidInputError

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth", ".bin", ".ckpt")
HINT = "commit it with --raw to store the bytes as they are"
_SCANNED = 1 << 22  # bytes of a pickle that are looked at one by one; of larger ones the ends
_BLOCK = 512  # of a tar file
_MEMBERS = 100_000


def require_whole(source: Source, name: str, *, alone: bool) -> None:
    """Prove of a file whose structure was not understood that it may be stored as bytes; one that
    is `alone` is no file of a directory.

    Raises:
        InvalidInputError: it is cut off, or damaged; or it is alone, and not what its name says.
    """
    suffix = name[name.rfind(".") :].lower()
    if not alone and suffix not in (SAFETENSORS, *TORCH):
        return
    if not source.size:
        raise InvalidInputError(f"{name} is empty", hint=HINT)
    if torch_zip.starts_like_zip(source):
        if not torch_zip.has_end(source):
            what = "it starts like a zip file and has no end"
            raise InvalidInputError(f"{name} is incomplete: {what}", hint=HINT)
        if suffix in TORCH and not torch_zip.is_archive(source):
            raise InvalidInputError(f"{name} is a damaged zip file", hint=HINT)
        if suffix in TORCH:
            return
    if torch_legacy.is_cut(source):
        raise InvalidInputError(f"{name} is incomplete: it ends within its tensors", hint=HINT)
    if suffix == SAFETENSORS:
        raise InvalidInputError(
            f"{name} is cut off or damaged: its tensors cannot be found", hint=HINT
        )
    if alone and suffix in TORCH and not _is_of_torch(source):
        raise InvalidInputError(
            f"{name} is cut off, or no file of torch: it has no structure", hint=HINT
        )


def _is_of_torch(source: Source) -> bool:
    return torch_legacy.begins_like_one(source) or _is_tar(source) or _is_pickle(source)


def _is_tar(source: Source) -> bool:
    """Whether it is a tar file, as torch wrote before 0.2, with all bytes of its members."""
    if source.size < _BLOCK or source.read(257, 5) != b"ustar":
        return False
    at = 0
    for _ in range(_MEMBERS):
        header = source.read(at, min(_BLOCK, source.size - at))
        if not header.strip(b"\0"):
            return True  # the end mark; or just the end
        digits = header[124:136].strip(b"\0 ")
        if header[257:262] != b"ustar" or not digits.isdigit() or digits.strip(b"01234567"):
            return False
        at += _BLOCK + -(-int(digits, 8) // _BLOCK) * _BLOCK
        if at > source.size:
            return False
    return True


def _is_pickle(source: Source) -> bool:
    """Whether it is a pickle that comes to its end."""
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
    try:  # the first protocols have no mark of their own: text may look like one
        read_pickle(torch_legacy.stream(source), source.size)
    except pickle.UnpicklingError:
        return False
    return True
