"""Names are cut in the middle, and stay different."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.cli.shortening import GAP, shorten

NEOX = [
    f"{top}gpt_neox.layers.{layer}.{name}.{end}"
    for top in ("", "optimizer.state.")
    for layer in range(12)
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "layernorm")
    for end in ("weight", "bias")
]
LLAMA = [
    f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(32) for name in "qkvo"
]


def stands_for(cut: str, names: list[str]) -> list[str]:
    pattern = ".*".join(map(re.escape, cut.split(GAP)))
    return [name for name in names if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("names", [NEOX, LLAMA], ids=["neox", "llama"])
@pytest.mark.parametrize("width", [26, 30, 36])
def test_a_cut_name_stands_for_one_tensor(names: list[str], width: int) -> None:
    for name, cut in zip(names, shorten(names, width), strict=True):
        assert len(cut) <= width
        assert stands_for(cut, names) == [name]


def test_short_names_stay() -> None:
    assert shorten(["model.bias", "a" * 12], 12) == ["model.bias", "a" * 12]


def test_the_number_of_the_layer_stays() -> None:
    assert shorten(LLAMA, 28)[41] == f"{GAP}.10.self_attn.k_proj.weight"


@given(st.lists(st.text(st.sampled_from("ab."), max_size=30), max_size=8), st.integers(4, 20))
def test_every_name_gets_a_cut_that_fits(names: list[str], width: int) -> None:
    for name, cut in zip(names, shorten(names, width), strict=True):
        assert len(cut) <= width
        assert name in stands_for(cut, names)
