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
    """Return the layer of each tensor; the state of a weight in an optimizer has its layer."""
    tensors, paired = schema.tensors, dict[str, str]()
    for info in tensors:
        if info.pair is not None:
            paired[_above(info.name)] = layer_of(tensors[info.pair].name)
    return [
        paired.get(_above(info.name)) or layer_of(info.name)
        if info.part == "optimizer"
        else layer_of(info.name)
        for info in tensors
    ]


def _above(name: str) -> str:
    """Return the name of the object that a tensor is in."""
    return name.rpartition(".")[0]
