"""The layer that a tensor belongs to, from its name."""

from __future__ import annotations

from ckptvcs.history.schema import Schema


def layer_of(name: str) -> str:
    """Return the layer of a tensor.

    The name of a layer ends with the first number (`model.layers.3`), otherwise before the last dot
    (`model.embed`).
    """
    file, colon, path = name.rpartition(":")
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdecimal()]
    end = numbers[0] + 1 if numbers else max(1, len(parts) - 1)
    return file + colon + ".".join(parts[:end])


def layers_of(schema: Schema) -> list[str]:
    """Return the layer of each tensor; a moment has the layer of its weight."""
    tensors = schema.tensors
    return [layer_of((info if info.pair is None else tensors[info.pair]).name) for info in tensors]
