"""Codec specifications: `lossless`, `excp`, `excp:alpha=1e-4,beta=2`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ckptvcs.errors import InvalidInputError

_LAG = 0.15  # twice the usual lag at a quantization step of one standard deviation


@dataclass(frozen=True)
class ExcpSpec:
    """The settings of ExCP (`ckptvcs.codec.excp`).

    `multiplier` sets r = multiplier * median|D|. The published rule with `alpha` depends on the
    scale of the model: on small models it prunes almost nothing.
    """

    alpha: float = 5e-5
    beta: float = 2.0
    clip: float = 2.5
    multiplier: float | None = None
    bits: int = 4


@dataclass(frozen=True)
class NearSpec:
    """The settings of the near codec. Quantization steps are in standard deviations.

    `step`: of all weights, relative to the movement of the whole model since the parent
    `cap`: the largest step of a tensor, relative to its own movement
    `gamma`: makes the steps of rows with large second moments smaller (0: all rows are equal)
    `zone`: the dead zone of weights, in steps
    `rank`, `rank_step`: rank-1 components of a first moment in Adam's ratio, and the step of their
        factors, relative to the weakest component
    `moment_step`: of first moments that are encoded without components, such as vectors
    `momentum_rank`, `momentum_nmse`: components of a momentum without a second moment, used if
        their error is at most `momentum_nmse`
    `momentum_step`: of other momenta

    The encoder uses smaller steps if the relative error of all weights would exceed
    `max_weight_error` (0: no bound), if their lag (see `ErrorReport`) would exceed `max_lag`, or if
    the relative squared error of the optimizer's next step would exceed `max_update_nmse` in a
    slice. A `max_lag` of 0 stands for twice the usual lag of `step`.
    """

    step: float = 2.4
    zone: float = 0.5
    gamma: float = 0.12
    cap: float = 3.2
    rank: int = 8
    rank_step: float = 1.5
    moment_step: float = 5.0
    momentum_rank: int = 16
    momentum_nmse: float = 0.3
    momentum_step: float = 1.5
    max_weight_error: float = 0.1
    max_lag: float = 0.0
    max_update_nmse: float = 0.85

    @property
    def lag_bound(self) -> float:
        """The largest lag. Steps of only one size, as of a sign optimizer, can exceed it."""
        return self.max_lag or _LAG * min(self.step, self.cap) ** 2


@dataclass(frozen=True)
class CodecSpec:
    """The name of a codec, and its settings if it has any."""

    name: str
    settings: ExcpSpec | NearSpec | None = None


PRESETS = {
    "near": CodecSpec("near", NearSpec()),
    "lossless": CodecSpec("lossless"),
    "excp": CodecSpec("excp", ExcpSpec()),
    "excp-max": CodecSpec("excp-max", ExcpSpec(multiplier=2.5)),
}
"""The codecs by name."""

REMOVED = ("small",)
"""Codecs of earlier versions.  Their commits decode, but new commits cannot use them."""

_RANGES = {
    "bits": (1, 8),
    "gamma": (0, 2),
    "zone": (0.5, 1),
    "rank": (0, 64),
    "momentum_rank": (0, 64),
    "max_weight_error": (0, 1e9),
    "max_lag": (0, 1e9),
}
_ANY = (1e-9, 1e9)
_WHOLE = ("bits", "rank", "momentum_rank")


def parse_codec(text: str) -> CodecSpec:
    """Parse the name of a preset, with settings after a colon: `near:step=1.5,gamma=0`.

    Raises:
        InvalidInputError: the preset or setting is unknown, or a value is out of range.
    """
    name, _, changes = text.partition(":")
    preset = PRESETS.get(name)
    if name in REMOVED:
        raise InvalidInputError(
            f"codec '{name}' was removed: its errors grew with each commit", hint="use near"
        )
    if preset is None:
        raise InvalidInputError(f"unknown codec '{name}'", hint=f"use one of {', '.join(PRESETS)}")
    if not changes:
        return preset
    if preset.settings is None:
        raise InvalidInputError(f"codec '{name}' has no settings")
    settings = preset.settings
    names = [field.name for field in fields(settings)]
    for change in changes.split(","):
        key, _, value = change.partition("=")
        if key not in names:
            raise InvalidInputError(
                f"codec '{name}' has no setting '{key}'", hint=f"use one of {', '.join(names)}"
            )
        try:
            number = int(value) if key in _WHOLE else float(value)
        except ValueError:
            raise InvalidInputError(
                f"invalid value for '{key}': expected a number, got '{value}'"
            ) from None
        low, high = _RANGES.get(key, _ANY)
        if not low <= number <= high:
            raise InvalidInputError(f"'{key}' is out of range: {value}")
        settings = replace(settings, **{key: number})  # type: ignore[arg-type]  # checked above
    return replace(preset, settings=settings)


def with_bounds(spec: CodecSpec, **bounds: float | None) -> CodecSpec:
    """Return a codec with other error bounds: None keeps a bound, infinity removes it.

    `bounds` are values of `max_weight_error`, `max_lag` and `max_update_nmse`.

    Raises:
        InvalidInputError: the codec has no error bounds.
    """
    settings = spec.settings
    given = {name: value for name, value in bounds.items() if value is not None}
    if settings is None or not given:
        return spec
    if not isinstance(settings, NearSpec):
        raise InvalidInputError(
            f"codec '{spec.name}' does not support error bounds",
            hint="set max-weight-error, max-lag and max-update-nmse to auto",
        )
    if given.get("max_weight_error") == float("inf"):
        given["max_weight_error"] = 0.0
    return replace(spec, settings=replace(settings, **given))  # type: ignore[arg-type]


def finer(spec: CodecSpec, excess: float) -> CodecSpec:
    """Return a codec with smaller steps, for use after an error `excess` times its bound."""
    settings = spec.settings
    assert isinstance(settings, NearSpec)
    share = min(0.7, 0.8 / excess)
    return replace(
        spec,
        settings=replace(
            settings,
            step=share * settings.step,
            cap=share * settings.cap,
            max_weight_error=share * settings.max_weight_error,
            max_lag=share**2 * settings.lag_bound,
        ),
    )
