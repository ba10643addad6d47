"""Find out whether all weights of a commit are finite."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from ckptvcs.checkpoint.roles import WEIGHT
from ckptvcs.codec.frame import SLICE_WORDS
from ckptvcs.codec.words import Words, to_float64, word_type
from ckptvcs.decode.commit_reader import Restorer, in_our_order
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.schema import BIG, TensorInfo
from ckptvcs.ops.diff_sides import Side

_BATCH_WORDS = 2 * SLICE_WORDS


def all_finite(catalog: Catalog, restorer: Restorer, finite: set[bytes]) -> bool:
    """Return whether every weight of a commit is finite.

    Tensors with a hash in `finite` are not read; the hashes of finite tensors are added to it.
    """
    side = Side(catalog, restorer, ("model",))
    stored = []
    for number in side.numbers.values():
        info, content = side.infos[number], side.content(number)
        # Big-endian weights have no role.
        if (info.role != WEIGHT and info.order != BIG) or not info.words or content in finite:
            continue
        if not info.inline:
            stored.append(number)
        elif not np.isfinite(to_float64(side.all_words(number), info.dtype)).all():
            return False
    for numbers in _batches(stored, side.infos):
        for index, words in enumerate(_words(side, numbers)):
            # A batch of one tensor yields several slices.
            info = side.infos[numbers[min(index, len(numbers) - 1)]]
            if not np.isfinite(to_float64(words, info.dtype)).all():
                return False
        finite.update(filter(None, map(side.content, numbers)))
    return True


def _words(side: Side, numbers: Sequence[int]) -> Generator[Words, None, None]:
    """Yield the words of several stored tensors, or of a single one slice by slice."""
    if len(numbers) == 1:
        info = side.infos[numbers[0]]
        for block in side.restorer.blocks(numbers[0]):
            yield in_our_order(np.frombuffer(block, word_type(info.type.word)), info)
        return
    for number, octets in side.restorer.tensors(list(numbers)):
        info = side.infos[number]
        yield in_our_order(octets.view(word_type(info.type.word)), info)


def _batches(numbers: Sequence[int], infos: Sequence[TensorInfo]) -> Iterator[list[int]]:
    """Yield batches of stored tensors, each of at most `_BATCH_WORDS` words or a single tensor.

    Threads decode the tensors of a batch in parallel, and memory holds one batch.
    """
    batch: list[int] = []
    words = 0
    for number in numbers:
        words += infos[number].words
        if batch and words > _BATCH_WORDS:
            yield batch
            batch, words = [], infos[number].words
        batch.append(number)
    if batch:
        yield batch
