"""Decode tensors of two commits together: frames that both chains have are decoded once.

A slice of both tensors is decoded in one thread, and reduced there (to sums, say) while it is in
the cache of the processor.  So memory is bounded by a few slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from ckptvcs.codec.frame import SLICE_WORDS, slices_of
from ckptvcs.codec.words import Words, octets, word_type
from ckptvcs.decode.chain import Link
from ckptvcs.decode.commit_reader import Restorer
from ckptvcs.errors import CorruptionError
from ckptvcs.hashing import hasher
from ckptvcs.parallel import Progress, ordered_map

R = TypeVar("R")

Pair = tuple[int, int]
"""The positions of one tensor in the schemas of two commits."""


@dataclass(frozen=True)
class _Job:
    """One slice of a pair; its chains are empty if they cannot be read."""

    pair: Pair
    chains: tuple[list[Link], list[Link]]
    number: int
    last: bool


@dataclass(frozen=True)
class _Done(Generic[R]):
    """The decoded words of a slice on both sides, and what they were reduced to."""

    words: tuple[Words, Words]
    result: R


def read_pairs(
    a: Restorer,
    b: Restorer,
    pairs: Sequence[Pair],
    reduce: Callable[[Pair, Words, Words], R],
    progress: Progress,
) -> Iterator[tuple[Pair, list[R]]]:
    """Yield each pair of stored tensors with the result of `reduce` for each of its slices.

    Both tensors of a pair have the same shape and type.  The results of a pair come after both
    tensors were checked against their hashes.

    Raises:
        NotFoundError: a part was dropped.
        CorruptionError: a tensor does not decode to its recorded hash.
    """

    def decode(job: _Job) -> tuple[_Job, _Done[R] | None]:
        info = a.schema.tensors[job.pair[0]]
        if not all(job.chains):
            return job, None
        try:
            words = a.chain.decode_pair(*job.chains, info, job.number)
        except CorruptionError:
            return job, None  # `_read_whole` infers element types, or raises this again
        return job, _Done(words, reduce(job.pair, *words))

    results: list[R] = []
    sound, digests = True, (hasher(), hasher())

    def words_of(job: _Job) -> int:
        return a.schema.tensors[job.pair[0]].words

    for job, done in ordered_map(decode, _jobs(a, b, pairs), words_of):
        if done is None:
            sound = False
        else:
            results.append(done.result)
            for digest, words in zip(digests, done.words, strict=True):
                digest.update(octets(words))
                progress(words.nbytes)
        if job.last:
            sides = zip((a, b), job.pair, digests, strict=True)
            if sound and all(side.has_hash(number, digest) for side, number, digest in sides):
                yield job.pair, results
            else:
                yield job.pair, _read_whole(a, b, job.pair, reduce)
            sound, digests, results = True, (hasher(), hasher()), []


def _jobs(a: Restorer, b: Restorer, pairs: Sequence[Pair]) -> Iterator[_Job]:
    for pair in pairs:
        chains: tuple[list[Link], list[Link]] = [], []
        with suppress(CorruptionError):
            chains = a.links(pair[0]), b.links(pair[1])
        slices = slices_of(a.schema.tensors[pair[0]].words)
        for number in slices:
            yield _Job(pair, chains, number, number + 1 == len(slices))


def _read_whole(
    a: Restorer, b: Restorer, pair: Pair, reduce: Callable[[Pair, Words, Words], R]
) -> list[R]:
    """Decode both tensors of a pair whole, and infer the types of frames that name none."""
    word = word_type(a.schema.tensors[pair[0]].type.word)
    one, other = a.tensor(pair[0]).view(word), b.tensor(pair[1]).view(word)
    return [
        reduce(pair, one[at : at + SLICE_WORDS], other[at : at + SLICE_WORDS])
        for at in range(0, one.size, SLICE_WORDS)
    ]
