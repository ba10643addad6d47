from __future__ import annotations

import pytest

from ckptvcs.codec.spec import PRESETS, parse_codec
from ckptvcs.errors import InvalidInputError


def test_settings_change_only_what_they_name() -> None:
    spec = parse_codec("excp:alpha=1e-4,bits=3")
    assert spec.excp is not None
    assert (spec.excp.alpha, spec.excp.bits) == (1e-4, 3)
    assert PRESETS["excp"].excp is not None
    assert spec.excp.beta == PRESETS["excp"].excp.beta


@pytest.mark.parametrize(
    "text",
    ["", "zip", "lossless:alpha=1", "excp:gamma=1", "excp:alpha", "excp:alpha=x", "excp:bits=0",
     "excp:bits=9", "excp:alpha=nan", "excp:beta=-1", "excp:,"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_codec(text)
