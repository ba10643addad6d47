from __future__ import annotations

import pytest

from ckptvcs.codec.spec import ExcpSpec, NearSpec, parse_codec
from ckptvcs.errors import InvalidInputError


def test_settings_change_only_what_they_name() -> None:
    spec = parse_codec("excp:alpha=1e-4,bits=3")
    assert spec.settings == ExcpSpec(alpha=1e-4, bits=3)
    assert parse_codec("near:step=1.5,gamma=0").settings == NearSpec(step=1.5, gamma=0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "zip",
        "lossless:alpha=1",
        "excp:gamma=1",
        "excp:alpha",
        "excp:alpha=x",
        "excp:bits=0",
        "excp:bits=9",
        "excp:alpha=nan",
        "excp:beta=-1",
        "excp:,",
        "near:step=0",
        "near:zone=0.3",
        "near:alpha=1",
        "near:gamma=nan",
        "small",
        "small:gamma=0",
        "near:step=inf",
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_codec(text)
