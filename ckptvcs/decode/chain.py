"""Decode tensors along their delta chains, from a keyframe forward.

    values[i] -> recipe -> frame -> base values[j] -> recipe -> frame -> ... -> keyframe

All frames of a chain have the same slice boundaries. Decoding one slice at a time keeps memory at a
few slices for any tensor. Each slice is checked against the hash in its bundle, each decoded tensor
against its hash in the hash table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from ckptvcs.codec.dtypes import DTYPES, WEIGHT_DTYPES, DType, float_type
from ckptvcs.codec.frame import SLICE_WORDS, Companion, decode_slice, slice_size, slices_of
from ckptvcs.codec.interpolate import interpolate
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.decode.stored_slice import has_slices, read_slice
from ckptvcs.errors import CkptError, CorruptionError
from ckptvcs.hashing import hash_of, hasher
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.recipe import Between, Frame
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import ObjectId

MAX_DEPTH = 4096
_MASTER = DTYPES["F32"]
_NO_BUNDLE = ObjectId("")
_MAX_CHANGES = 4  # of the word size along a chain: each can make decoding eight times slower
_CANDIDATES = ("U8", "U16", "BF16", "F16", "U32", "F32", "U64", "F64")
"""Element types to try for a frame that names none."""

Types = dict[tuple[ObjectId, int], str]
"""The inferred element types of frames that name none, by bundle and number."""


@dataclass(frozen=True)
class _Stage:
    """A frame of a chain, and the hash of the tensor that it decodes to, if known."""

    place: tuple[ObjectId, int]
    frame: Frame
    expected: bytes | None


class DecodedTable(Protocol):
    """The decoded and verified tensors of a hash table."""

    def slice(self, tensor: int, number: int, word: int, out: Words | None = None) -> Words | None:
        """Return slice `number` of a tensor as read-only words of `word` bytes, or None.

        With `out`, the slice may be written there without verification: the caller must verify it.
        """

    def has(self, tensor: int) -> bool:
        """Return whether the tensor is certainly available, so the frames below are not needed."""
        return False


DecodedTables = Callable[[ObjectId], DecodedTable | None]
"""Returns the decoded tensors of a hash table, if any."""


@dataclass(frozen=True)
class Link:
    """One frame of a chain.

    type        element type that the frame was encoded as
    companion   the chain of its auxiliary frame
    decoded     the table and position of the tensor that it decodes to, if that is available
    between     for an interpolated tensor, whose frame is empty: what it is between
    """

    bundle: ObjectId
    frame: Frame
    type: DType
    companion: tuple[Link, ...] = ()
    decoded: tuple[DecodedTable, int] | None = None
    between: Ends | None = None


@dataclass(frozen=True)
class Ends:
    """The chains of two tensors, and a share of the way from the first to the last."""

    first: list[Link]
    last: list[Link]
    part: int
    whole: int


class ChainReader:
    """Decodes the tensors of hash tables, from cached bases if possible."""

    def __init__(self, catalog: Catalog, decoded: DecodedTables = lambda _: None) -> None:
        self._catalog, self._decoded = catalog, decoded
        self._types: Types = {}

    def links(self, values: ObjectId, tensor: int, info: TensorInfo) -> list[Link]:
        """Return the frames of a tensor, from its keyframe or a decoded tensor on.

        Raises:
            CorruptionError: a frame is not based on one of lower depth, or has a type that
                the bytes of the tensor cannot have.
        """
        place = self._catalog.place(values, tensor)
        if isinstance(place, Between):
            return [self._interpolated(place, values, tensor, info)]
        chain = self._chain(place, info.type, (values, tensor))
        _check_types(chain, info)
        return chain

    def _interpolated(
        self, place: Between, values: ObjectId, tensor: int, info: TensorInfo
    ) -> Link:
        """Return the link of an interpolated tensor."""
        table, chains = self._decoded(values), list[list[Link]]()
        decoded = None if table is None else (table, tensor)
        empty, dtype = Frame(None, 0, None, ()), DTYPES[float_type(info.dtype)]
        if decoded is not None and decoded[0].has(tensor):
            return Link(_NO_BUNDLE, empty, dtype, (), decoded)
        for end in (place.first, place.last):
            chain = self._chain(self._catalog.frame_place(*end), dtype, end)
            if dtype.name not in WEIGHT_DTYPES or any(link.type != dtype for link in chain):
                raise CorruptionError(f"{info.name} is interpolated between other types")
            chains.append(chain)
        return Link(
            _NO_BUNDLE,
            empty,
            dtype,
            (),
            decoded,
            Ends(chains[0], chains[1], place.part, place.whole),
        )

    def _chain(
        self, top: tuple[ObjectId, int], asked: DType, tensor: tuple[ObjectId, int] | None
    ) -> list[Link]:
        """Return the chain that ends in the frame `top`, which encodes `tensor` of a hash table.

        A frame that names no type has the type `asked`, that of the tensor or the frame above. An
        auxiliary frame has no tensor, and must not need another auxiliary frame.
        """
        chain: list[Link] = []
        for place, frame, at in self._walk(top, tensor):
            dtype = frame.dtype or self._types.get(place)
            asked = DTYPES[dtype] if dtype else asked
            if tensor is None and frame.companion is not None:
                raise CorruptionError(f"bundle {place[0][:8]} is damaged: nested auxiliary frames")
            companion = self._beside(place[0], frame)
            table = None if at is None else self._decoded(at[0])
            decoded = None if at is None or table is None else (table, at[1])
            chain.append(Link(place[0], frame, asked, companion, decoded))
            if decoded is not None and decoded[0].has(decoded[1]):
                break
        return chain[::-1]

    def _beside(self, bundle: ObjectId, frame: Frame) -> tuple[Link, ...]:
        """Return the chain of the auxiliary frame of a frame, if it has one."""
        if frame.companion is None:
            return ()
        # Only master weights are auxiliary frames with a base, and those are F32.
        return tuple(self._chain((bundle, frame.companion), _MASTER, None))

    def _walk(
        self, place: tuple[ObjectId, int], tensor: tuple[ObjectId, int] | None
    ) -> Iterator[tuple[tuple[ObjectId, int], Frame, tuple[ObjectId, int] | None]]:
        """Yield the frame at a place and those below it, down to the keyframe.

        Before each comes its place, after it the place of its tensor in a hash table, if known.
        """
        limit = MAX_DEPTH
        while True:
            frame = self._catalog.frame_at(*place)
            if frame.depth > limit:
                raise CorruptionError(
                    f"corrupt delta chain: bundle {place[0][:8]} "
                    "references a frame that is not an ancestor"
                )
            yield place, frame, tensor
            if frame.base is None:
                return
            limit, tensor = frame.depth - 1, frame.base
            place = self._catalog.frame_place(*tensor)

    def require_slices(self, values: ObjectId, tensor: int, info: TensorInfo) -> None:
        """Check the number of slices of a tensor before memory is allocated for it.

        Raises:
            CorruptionError: the schema claims another size than the frame has.
        """
        place = self._catalog.place(values, tensor)
        if isinstance(place, Between):
            for end in (place.first, place.last):
                self._catalog.frame_place(*end)
                self.require_slices(*end, info)
            return
        bundle, frame = place[0], self._catalog.frame_at(*place)
        types = [DTYPES[frame.dtype]] if frame.dtype else DTYPES.values()
        if not any(has_slices(frame, info.size_bytes, dtype) for dtype in types):
            raise CorruptionError(
                f"bundle {bundle[:8]} is damaged: wrong number of slices for {info.name}"
            )

    def depth(self, values: ObjectId, tensor: int) -> int:
        """Return the number of frames below this tensor in its chain."""
        return self._catalog.depth(values, tensor)

    def heal(self, values: ObjectId, tensor: int, info: TensorInfo) -> bool:
        """Infer the element types of frames that name none, from the hashes of their tensors.

        Versions before the field `dtype` reused frames of tensors with the same bytes, but another
        type. Return whether a type differs from the assumed one.
        """
        types = self._find_types(self._path(values, tensor), info)
        new = {place: name for place, name in types.items() if self._types.get(place) != name}
        self._types |= new
        return bool(new)

    def _path(self, values: ObjectId, tensor: int) -> list[_Stage]:
        """Return the frames of a tensor, from its keyframe on."""
        path: list[_Stage] = []
        top = self._catalog.place(values, tensor)
        if isinstance(top, Between):
            return []  # its ends name their types
        for place, frame, at in self._walk(top, (values, tensor)):
            expected: bytes | None = None
            with contextlib.suppress(CkptError):  # gc may have deleted tables of dropped commits
                expected = self._catalog.value(*at) if at else None
            path.append(_Stage(place, frame, expected))
        return path[::-1]

    def _find_types(self, path: list[_Stage], info: TensorInfo) -> dict[tuple[ObjectId, int], str]:
        """Search for types with which all frames decode to their hashes; return them by frame."""
        if not path or path[-1].expected is None or all(stage.frame.dtype for stage in path):
            return {}
        open_ = [self._options(path[0], info, None)]
        chosen: list[str] = []
        while open_:
            option = next(open_[-1], None)
            if option is None:
                open_.pop()
                del chosen[-1:]
                continue
            chosen[len(open_) - 1 :] = [option[0]]
            if len(chosen) == len(path):
                return {
                    stage.place: name
                    for stage, name in zip(path, chosen, strict=True)
                    if stage.frame.dtype is None
                }
            open_.append(self._options(path[len(chosen)], info, option[1]))
        return {}

    def _options(
        self, stage: _Stage, info: TensorInfo, below: bytes | None
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the types with which a frame decodes to its hash, and the decoded bytes."""
        names = [stage.frame.dtype] if stage.frame.dtype else [info.dtype, *_CANDIDATES]
        for name in dict.fromkeys(names):
            if has_slices(stage.frame, info.size_bytes, DTYPES[name]):
                with contextlib.suppress(CorruptionError):
                    data = self._decode_stage(stage, DTYPES[name], info.size_bytes, below)
                    if stage.expected in (None, hash_of(data)):
                        yield name, data

    def _decode_stage(self, stage: _Stage, dtype: DType, size: int, below: bytes | None) -> bytes:
        bundle, frame = stage.place[0], stage.frame
        link = Link(bundle, frame, dtype, self._beside(bundle, frame))
        words = None if below is None else np.frombuffer(below, word_type(dtype.word))
        parts = []
        for number in slices_of(size // dtype.word):
            base = None if words is None else words[number * SLICE_WORDS :][:SLICE_WORDS]
            count = slice_size(size // dtype.word, number)
            parts.append(octets(self._apply(link, number, count, base, None, own=False)))
        return b"".join(parts)

    def decode_slice(
        self, chain: Sequence[Link], info: TensorInfo, number: int, out: Words | None = None
    ) -> Words:
        """Decode slice `number` of a tensor, into `out` if that is given.

        The caller must check the whole tensor against its hash.
        """
        word = info.type.word
        if any(link.type.word != word for link in chain):
            return _placed(self._cut(chain, info.size_bytes, word, number), out)
        return _placed(self._run(chain, number, slice_size(info.words, number), None, out), out)

    def _run(
        self,
        chain: Sequence[Link],
        number: int,
        count: int,
        base: Words | None,
        out: Words | None = None,
    ) -> Words:
        """Decode a slice with frames of one word size, from `base` or a decoded tensor."""
        words, first = _start(chain, number, chain[-1].type.word, out)
        base = base if words is None else words
        return self._extend(chain[first:], number, count, base, out)

    def _extend(
        self,
        links: Sequence[Link],
        number: int,
        count: int,
        words: Words | None,
        out: Words | None = None,
    ) -> Words:
        """Decode a slice with some links, given the words that they are based on."""
        own = False
        for link in links:
            own |= words is not None and out is not None and np.may_share_memory(words, out)
            words = self._apply(link, number, count, words, out, own=own)
            own = True
        assert words is not None
        return words

    def decode_pair(
        self, a: Sequence[Link], b: Sequence[Link], info: TensorInfo, number: int
    ) -> tuple[Words, Words]:
        """Decode slice `number` of two tensors of one shape and type; decode common frames once.

        The caller must check both tensors against their hashes.
        """
        word = info.type.word
        if not _shared(a, b) or any(link.type.word != word for link in (*a, *b)):
            return self.decode_slice(a, info, number), self.decode_slice(b, info, number)
        return self._run_pair(a, b, number, slice_size(info.words, number))

    def _run_pair(
        self, a: Sequence[Link], b: Sequence[Link], number: int, count: int
    ) -> tuple[Words, Words]:
        """Decode a slice of two chains of one word size; decode common frames once."""
        word, shared = a[-1].type.word, _shared(a, b)
        (one, first), (other, second) = (_start(chain, number, word, None) for chain in (a, b))
        if shared and max(first, second) <= shared:  # both continue from the last common frame
            words, at = (one, first) if first >= second else (other, second)
            common = self._extend(a[at:shared], number, count, words)
            one, other, first, second = common, common, shared, shared
        return (
            self._extend(a[first:], number, count, one),
            self._extend(b[second:], number, count, other),
        )

    def _cut(self, chain: Sequence[Link], size: int, word: int, number: int) -> Words:
        """Decode a slice in words of `word` bytes with frames of other word sizes.

        `size` is that of the tensor in bytes.
        """
        own = chain[-1].type.word
        if own != word:
            start = number * SLICE_WORDS * word
            stop = min(size, start + SLICE_WORDS * word)
            first = start // (SLICE_WORDS * own)
            numbers = range(first, -(-stop // (SLICE_WORDS * own)))
            parts = [octets(self._cut(chain, size, own, n)) for n in numbers]
            at = first * SLICE_WORDS * own
            return np.frombuffer(b"".join(parts)[start - at : stop - at], word_type(word))
        first = len(chain) - 1
        while first and chain[first - 1].type.word == own:
            first -= 1
        base = self._cut(chain[:first], size, own, number) if first else None
        return self._run(chain[first:], number, slice_size(size // own, number), base)

    def apply(self, link: Link, number: int, base: Words, out: Words | None = None) -> Words:
        """Decode a slice with one link, given the words of its base."""
        return _placed(self._apply(link, number, base.size, base, out, own=False), out)

    def _apply(
        self,
        link: Link,
        number: int,
        count: int,
        base: Words | None,
        out: Words | None,
        *,
        own: bool,
    ) -> Words:
        if link.between is not None:
            ends = link.between
            first, last = self._run_pair(ends.first, ends.last, number, count)
            return _placed(interpolate(first, last, ends.part, ends.whole, link.type.name), out)
        data = self._read_slice(link, number)
        companion = self._companion(link, number, count)
        return decode_slice(data, link.type, count, base, companion, own_base=own, out=out)

    def _read_slice(self, link: Link, number: int) -> memoryview:
        data = read_slice(self._catalog, link.bundle, link.frame, number, unhashed_patch=True)
        return memoryview(data)

    def _companion(self, link: Link, number: int, count: int) -> Companion | None:
        if not link.companion:
            return None
        *below, last = link.companion
        data = self._read_slice(last, number)
        base = None
        if below:
            size = (number * SLICE_WORDS + count) * _MASTER.word
            base = self._cut(below, size, _MASTER.word, number)
        return Companion(data, base)

    def slices(
        self, values: ObjectId, tensor: int, info: TensorInfo
    ) -> Iterator[tuple[int, Words]]:
        """Yield the number and the words of each slice of a tensor.

        The last slice comes after the hash of the tensor was checked. The slices start again from
        0 if the element types of frames had to be inferred.

        Raises:
            CorruptionError: the tensor does not have its recorded hash.
        """
        try:
            yield from self._slices(values, tensor, info)
        except CorruptionError:
            if not self.heal(values, tensor, info):
                raise
            yield from self._slices(values, tensor, info)

    def _slices(
        self, values: ObjectId, tensor: int, info: TensorInfo
    ) -> Iterator[tuple[int, Words]]:
        self.require_slices(values, tensor, info)
        chain = self.links(values, tensor, info)
        digest = hasher()
        pending: tuple[int, Words] | None = None
        for number in slices_of(info.words):
            if pending is not None:
                yield pending
            pending = number, self.decode_slice(chain, info, number)
            digest.update(octets(pending[1]))
        if digest.digest() != self._catalog.value(values, tensor):
            raise CorruptionError(f"{info.name} does not decode to its recorded hash")
        if pending is not None:
            yield pending


def _check_types(chain: Sequence[Link], info: TensorInfo) -> None:
    """Raise CorruptionError if a type does not fit the tensor, or the word size changes too often.

    Only a hostile repository changes the word size that often.
    """
    changes, word = 0, info.type.word
    for link in reversed(chain):
        if info.size_bytes % link.type.word:
            raise CorruptionError(
                f"corrupt delta chain of {info.name}: unexpected type {link.type.name}"
            )
        changes, word = changes + (link.type.word != word), link.type.word
    if changes > _MAX_CHANGES:
        raise CorruptionError(f"corrupt delta chain of {info.name}: too many changes of word size")


def _start(
    chain: Sequence[Link], number: int, word: int, out: Words | None
) -> tuple[Words | None, int]:
    """Return the words of the last available decoded tensor, and the number of links below it."""
    for place in range(len(chain) - 1, -1, -1):
        decoded = chain[place].decoded
        words = None if decoded is None else decoded[0].slice(decoded[1], number, word, out)
        if words is not None:
            return words, place + 1
    return None, 0


def _shared(a: Sequence[Link], b: Sequence[Link]) -> int:
    """Return the number of first links that two chains have in common."""
    pairs = zip(a, b, strict=False)
    same = (
        (x.bundle, x.frame, x.type) == (y.bundle, y.frame, y.type) and x.between == y.between
        for x, y in pairs
    )
    return sum(takewhile(bool, same))


def _placed(words: Words, out: Words | None) -> Words:
    if out is None or np.may_share_memory(words, out):
        return words
    out[:] = words
    return out
