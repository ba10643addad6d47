"""What a user asks of the codec, as plain data: `lossless`, `excp`, `excp:alpha=1e-4,beta=2`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from ckptvcs.errors import InvalidInputError


@dataclass(frozen=True)
class ExcpSpec:
    """The settings of ExCP.

    `multiplier` fixes r = multiplier * median|D|, in place of the rule with alpha, which is not
    free of scale: on small models it prunes almost nothing.
    """

    alpha: float = 5e-5
    beta: float = 2.0
    clip: float = 2.5
    multiplier: float | None = None
    bits: int = 4


@dataclass(frozen=True)
class CodecSpec:
    """A codec by `name`; `excp` holds its settings where the name asks for them."""

    name: str
    excp: ExcpSpec | None = None


PRESETS = {
    "lossless": CodecSpec("lossless"),
    "excp": CodecSpec("excp", ExcpSpec()),
    "excp-max": CodecSpec("excp-max", ExcpSpec(multiplier=2.5)),
}
"""The codecs a user can name."""

_BITS = range(1, 9)


def parse_codec(text: str) -> CodecSpec:
    """Read a preset's name, with settings after a colon: `excp:alpha=1e-4,bits=3`.

    Raises:
        InvalidInputError: no such preset or setting, or a value out of range.
    """
    name, _, settings = text.partition(":")
    preset = PRESETS.get(name)
    if preset is None:
        raise InvalidInputError(
            f"unknown codec '{name}'", hint=f"codecs: {', '.join(sorted(PRESETS))}"
        )
    if not settings:
        return preset
    if preset.excp is None:
        raise InvalidInputError(f"codec '{name}' has no settings")
    excp = preset.excp
    known = {field.name for field in fields(ExcpSpec)}
    for setting in settings.split(","):
        key, _, value = setting.partition("=")
        if key not in known:
            raise InvalidInputError(
                f"codec '{name}' has no setting '{key}'", hint=f"settings: {', '.join(known)}"
            )
        try:
            number = int(value) if key == "bits" else float(value)
        except ValueError:
            raise InvalidInputError(f"'{key}' needs a number, not '{value}'") from None
        if not (math.isfinite(number) and number > 0) or (key == "bits" and number not in _BITS):
            raise InvalidInputError(f"'{key}' is out of range: {value}")
        excp = replace(excp, **{key: number})  # type: ignore[arg-type]  # checked just above
    return replace(preset, excp=excp)
