"""Find the tensors of earlier commits that new frames are based on."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ckptvcs.checkpoint.matching import alike
from ckptvcs.codec.words import Floats, Words
from ckptvcs.decode.base_cache import MemoryBase, find_decoded
from ckptvcs.decode.chain import ChainReader, DecodedTable
from ckptvcs.encode.error_sample import FOLDER, read_sample
from ckptvcs.errors import CorruptionError, MissingObjectError
from ckptvcs.history.catalog import Catalog
from ckptvcs.history.commit import Commit, load_errors
from ckptvcs.history.schema import TensorInfo
from ckptvcs.store.ids import Kind, ObjectId


def match_tensors(old: Sequence[TensorInfo], new: Sequence[TensorInfo]) -> dict[int, int]:
    """Map tensors in `new` to the same ones in `old`, by position.

    The same tensor has the same part, name (see `alike`), type and shape.
    """
    names = alike([info.name for info in old], [info.name for info in new])
    numbers = {(i.part, i.name, i.dtype, i.shape): number for number, i in enumerate(old)}
    keys = [(i.part, names.get(i.name, ""), i.dtype, i.shape) for i in new]
    return {number: numbers[key] for number, key in enumerate(keys) if key in numbers}


def _errors_of(catalog: Catalog, commit: Commit) -> dict[int, float]:
    """Return the relative errors of the near weights of a commit, by position in its schema.

    If those of single tensors are not known, that of all weights takes their place.
    """
    if commit.errors is not None:
        with contextlib.suppress(MissingObjectError, CorruptionError):  # dropped, or lost
            table = load_errors(catalog.store.get(commit.errors, Kind.ERRORS))
            return {number: report.weight_rel for number, report in table.items()}
    count = len(catalog.schema(commit.schema).tensors)
    return dict.fromkeys(range(count), commit.error.weight_rel)


class BaseTensor:
    """A base, decoded slice by slice. Call `verify` before using the first slice."""

    def __init__(
        self,
        chain: ChainReader,
        values: ObjectId,
        tensor: int,
        info: TensorInfo,
        error: float = 0.0,
        errors: Floats | None = None,
    ) -> None:
        """`error` is the relative error of the tensor; `errors` are a sample, if there is one."""
        self.place, self._info = (values, tensor), info
        self.error, self.errors = error, errors
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
        self._errors: dict[int, float] = {}
        self._samples: dict[int, Floats] = {}
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
            tensors = [schema.tensors[number] for number in row]
            held = memory if part == "model" else None
            decoded[state.values] = find_decoded(
                catalog, cache, held, state.values, tensors, change=True
            )
            places |= {
                number: catalog.framed(state.values, position)
                for position, number in enumerate(row)
            }
            if part == "model":
                found = read_sample(cache.parent / FOLDER, memory, state.values, tensors)
                self._samples |= {row[position]: errors for position, errors in found.items()}
        matches = match_tensors(schema.tensors, infos)
        self.places = {new: places[old] for new, old in matches.items() if old in places}
        errors = _errors_of(catalog, base)
        self._errors = {new: errors.get(old, 0.0) for new, old in matches.items()}
        self._samples = {
            new: self._samples[old] for new, old in matches.items() if old in self._samples
        }

    def tensor(self, number: int) -> BaseTensor | None:
        """Return the base of a tensor, not yet verified, or None."""
        if number not in self.places:
            return None
        place, error = self.places[number], self._errors[number]
        errors = self._samples.get(number) if error else None
        base = BaseTensor(self._chain, *place, self._infos[number], error, errors)
        return base if base.has_same_slices() else None
