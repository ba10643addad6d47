"""Find the tensors of earlier commits that new frames are based on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ckptvcs.checkpoint.matching import alike
from ckptvcs.codec.words import Words
from ckptvcs.decode.base_cache import MemoryBase, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import ObjectId


def match_tensors(old: Sequence[TensorInfo], new: Sequence[TensorInfo]) -> dict[int, int]:
    """Map tensors in `new` to the same ones in `old`, by position.

    The same tensor has the same part, name (see `alike`), type and shape.
    """
    names = alike([info.name for info in old], [info.name for info in new])
    numbers = {(i.part, i.name, i.dtype, i.shape): number for number, i in enumerate(old)}
    keys = [(i.part, names.get(i.name, ""), i.dtype, i.shape) for i in new]
    return {number: numbers[key] for number, key in enumerate(keys) if key in numbers}


class BaseTensor:
    """A base, decoded slice by slice. Call `verify` before using the first slice."""

    def __init__(self, chain: ChainReader, values: ObjectId, tensor: int, info: TensorInfo) -> None:
        self.place, self._info = (values, tensor), info
        self._chain, self._links = chain, chain.links(values, tensor, info)

    def verify(self) -> None:
        """Verify the tensor, unless a verified copy is available.

        Raises:
            CorruptionError: the tensor does not match its recorded hash.
        """
        decoded, word = self._links[-1].decoded, self._info.type.word
        if self._info.words and (decoded is None or decoded[0].slice(decoded[1], 0, word) is None):
            deque(self._chain.slices(*self.place, self._info), 0)
            self._links = self._chain.links(*self.place, self._info)

    def has_same_slices(self) -> bool:
        """Return whether the frame has slices at the same offsets as the tensor.

        The frame may belong to a tensor with the same bytes, but words of another size.
        """
        return self._links[-1].type.word == self._info.type.word

    @property
    def depth(self) -> int:
        """Return the number of frames below this one in the chain."""
        return self._links[-1].frame.depth

    def slice(self, number: int) -> Words:
        """Return the words of one slice."""
        return self._chain.decode_slice(self._links, self._info, number)


class Bases:
    """The tensors of a base commit that a checkpoint with tensors `infos` also has.

    `places` has the hash table and the position there of each of them.
    """

    def __init__(
        self,
        catalog: Catalog,
        cache: Path,
        memory: MemoryBase | None,
        base: Commit | None,
        infos: Sequence[TensorInfo],
    ) -> None:
        self._infos = infos
        self.places: dict[int, tuple[ObjectId, int]] = {}
        decoded: dict[ObjectId, DecodedTable | None] = {}
        self._chain = ChainReader(catalog, decoded.get)
        if base is None:
            return
        schema = catalog.schema(base.schema)
        places: dict[int, tuple[ObjectId, int]] = {}
        for part, state in base.parts.items():
            if not catalog.store.contains(state.values) or not catalog.has_recipe(state.values):
                continue  # a retention rule dropped the part
            row = schema.stored(part)
            decoded[state.values] = find_decoded(
                catalog,
                cache,
                memory if part == "model" else None,
                state.values,
                [schema.tensors[number] for number in row],
                change=True,
            )
            places |= {number: (state.values, position) for position, number in enumerate(row)}
        matches = match_tensors(schema.tensors, infos)
        self.places = {new: places[old] for new, old in matches.items() if old in places}

    def tensor(self, number: int) -> BaseTensor | None:
        """Return the base of a tensor, not yet verified, or None."""
        if number not in self.places:
            return None
        base = BaseTensor(self._chain, *self.places[number], self._infos[number])
        return base if base.has_same_slices() else None
