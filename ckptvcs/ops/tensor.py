"""One tensor of a commit: its values, their statistics, and its export to a file."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ckptvcs.codec.dtypes import DTYPES
from ckptvcs.codec.words import to_float32, to_float64, word_type
from ckptvcs.decode.part_reader import PartReader, write_whole
from ckptvcs.decode.trajectory import find_tensor
from ckptvcs.errors import InvalidInputError
from ckptvcs.files.targets import Targets
from ckptvcs.history.revision import split_tensor
from ckptvcs.ops.repository import Repository


class TensorView:
    """One tensor of a commit; its values are read on first access.

    Attributes:
        id: The id of the commit.
        name: The full name of the tensor.
        step: The training step of the commit, if known.
        dtype: The element type, such as `BF16`.
        shape: The shape.
        fidelity: `exact` or `near`.
    """

    def __init__(self, repository: Repository, where: str) -> None:
        """Open a tensor; see `Repo.tensor_view`."""
        revision, name = split_tensor(where)
        self.id = repository.resolve(revision)
        self._reader = PartReader(repository.restorer(self.id))
        self.name, self._window = find_tensor(self._reader.schema, name)
        self.step = repository.catalog.commit(self.id).step
        view = self._window[1]
        self.dtype, self.shape = view.dtype, tuple(view.shape)
        self.fidelity = self._reader.fidelity(self._window)

    @cached_property
    def values(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The values as a numpy array; float32 if numpy lacks the element type.

        Raises:
            CorruptionError: The tensor does not decode to its recorded hash.
        """
        values: np.ndarray[Any, np.dtype[Any]] = read_numbers(self._reader, self._window)
        return values

    def statistics(self) -> dict[str, float | None]:
        """Return statistics of the finite values by name.

        The names are `min`, `max`, `mean`, `std`, `norm`, `zeros` and `not_finite`.  A value is
        None if no entry is finite.
        """
        return summarize(self.values)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the tensor as .npy, .pt or .safetensors, by the suffix of `path`.

        Args:
            path: The file to write.
            force: Overwrite an existing file.

        Raises:
            InvalidInputError: The suffix is not known.
            ConflictError: The file exists, and `force` is not set.
        """
        with Targets() as looks:
            target = looks.free(path, force=force)
            if path.suffix == ".npy":
                write_whole(target, lambda out: np.save(out, self.values, allow_pickle=False))
            elif path.suffix in (".pt", ".safetensors"):
                self._reader.save_tensor(self.name, self._window, target)
            else:
                raise InvalidInputError(
                    f"{path} has an unknown suffix", hint="use .npy, .pt or .safetensors"
                )


def read_numbers(reader: PartReader, window: Any) -> Any:
    """Return the values of a tensor as a numpy array; float32 if numpy lacks their type."""
    data, view = reader.window(window), window[1]
    dtype, shape = DTYPES[view.dtype], view.shape
    if dtype.numpy:
        return np.frombuffer(data, dtype.numpy).reshape(shape)
    words = np.frombuffer(data, word_type(dtype.word))
    if dtype.name == "C32":
        return words.view(np.float16).astype(np.float32).view(np.complex64).reshape(shape)
    if dtype.name == "BF16":
        return to_float32(words, "BF16").reshape(shape)
    if dtype.name == "F4":  # two values in a byte
        shape = (*shape[:-1], 2 * (shape or (1,))[-1])
    return to_float64(words, dtype.name).astype(np.float32).reshape(shape)


def summarize(values: Any) -> dict[str, float | None]:
    """Return the statistics of `TensorView.statistics`; of complex values, those of |x|."""
    wide = np.abs(values) if values.dtype.kind == "c" else values
    wide = wide.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    moments: dict[str, float | None] = dict.fromkeys(("min", "max", "mean", "std", "norm"))
    if finite.size:
        with np.errstate(over="ignore", invalid="ignore"):
            moments = {
                "min": float(finite.min()),
                "max": float(finite.max()),
                "mean": float(finite.mean()),
                "std": float(finite.std()),
                "norm": float(np.sqrt(np.square(finite).sum())),
            }
    counts = {"zeros": int((finite == 0).sum()), "not_finite": int(wide.size - finite.size)}
    plain = {k: v if v is None or math.isfinite(v) else None for k, v in moments.items()}
    return plain | counts
