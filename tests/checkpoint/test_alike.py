"""The same tensor under the names of two commits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint.matching import alike, pair_names

DEEPSPEED = [
    "global_step{0}/mp_rank_00_model_states.pt:module.layers.0.w",
    "global_step{0}/zero_pp_rank_0_mp_rank_00_optim_states.pt:optimizer_state_dict.exp_avg",
    "global_step{0}/zero_pp_rank_1_mp_rank_00_optim_states.pt:optimizer_state_dict.exp_avg",
    "rng_state_0.pth:cuda",
    "model.safetensors:w",
    "scheduler.pt:x",
]
TREES = [
    DEEPSPEED,
    [f"checkpoint-{{0}}/{name}" for name in DEEPSPEED],
    [
        "iter_{0:07}/mp_rank_00/model_optim_rng.pt:w",
        "iter_{0:07}/mp_rank_01/model_optim_rng.pt:w",
        "iter_{0:07}/mp_rank_00/distrib_optim.pt:w",
    ],
    [
        "global_step{0}_universal/zero/time_step.0/fp32.pt:param",
        "global_step{0}_universal/zero/time_step.1/fp32.pt:param",
        "global_step{0}_universal/zero/layers.1.weight/exp_avg.pt:param",
        "global_step{0}_universal/zero/layers.2.weight/exp_avg.pt:param",
    ],
    ["checkpoint_{1}_{0}-model_part-0-shard0.pt:w", "checkpoint_{1}_{0}-model_part-0-shard1.pt:w"],
    ["model{0:06}.pt:w", "opt{0:06}.pt:w", "ema_0.9999_{0:06}.pt:w", "ema_0.999_{0:06}.pt:w"],
    ["model_{0}.pt:w", "opt_{0}.pt:w", "ema_0.99_{0}.pt:w"],
    ["step-{0}/__0_0.distcp:w", "step-{0}/__1_0.distcp:w", "step-{0}/__1_1.distcp:w"],
    ["epoch_{1}/model.pt:w", "epoch_{1}/optim.pt:w"],
    ["ep{1}-ba{0}/__0_0.distcp:w", "ep{1}-ba{0}/__1_0.distcp:w"],
    [
        "layer_00-model_00-model_states.pt:w",
        "layer_01-model_00-model_states.pt:w",
        "global_step{0}/layer_00-model_01-model_states.pt:w",
    ],
]


def named(tree: list[str], step: int, epoch: int) -> list[str]:
    return [name.format(step, epoch) for name in tree]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("steps", [(500, 1000), (0, 10), (1, 2), (9, 10), (99, 100), (1000, 500)])
@pytest.mark.parametrize("epochs", [(0, 0), (0, 1), (3, 12)])
def test_trees_whose_paths_hold_the_step(
    tree: list[str], steps: tuple[int, int], epochs: tuple[int, int]
) -> None:
    if any(epoch > step for epoch, step in zip(epochs, steps, strict=True)):
        epochs = (0, 0)  # an epoch has one step at least
    old, new = named(tree, steps[0], epochs[0]), named(tree, steps[1], epochs[1])
    expected = dict(zip(new, old, strict=True))
    assert alike(old, new) == expected
    assert pair_names(old, new) == expected


def test_names_without_a_path_are_what_they_are() -> None:
    old = ["model.step1.weight", "model.layers.3.w", "optimizer.state.100.exp_avg"]
    assert alike(old, ["model.step2.weight", "model.layers.3.w", "model.layers.4.w"]) == {
        "model.layers.3.w": "model.layers.3.w"
    }


def test_numbers_that_are_no_steps_tell_files_apart() -> None:
    for one, other in (
        ("rank0.pt:w", "rank1.pt:w"),
        ("a/seed1/model.pt:w", "a/seed2/model.pt:w"),
        ("model-7b.pt:w", "model-13b.pt:w"),
        ("v1/model.pt:w", "v2/model.pt:w"),
        ("expert_3/w.pt:w", "expert_4/w.pt:w"),
        ("global_step5/a.pt:w", "global_step9/b.pt:w"),
        ("step5/a.pt:w", "step6/a.pt:v"),
        ("step5/a.pt:w", "iter6/a.pt:w"),
    ):
        assert alike([one], [other]) == {}


def test_of_several_steps_the_newest_is_meant() -> None:
    old = ["global_step100/a.pt:w", "global_step900/a.pt:w"]
    new = ["global_step900/a.pt:w", "global_step1000/a.pt:w"]
    assert alike(old, new) == {new[0]: old[1], new[1]: old[1]}
    assert pair_names(old, new) == {new[0]: old[1], new[1]: old[0]}
    assert pair_names([*old, "global_step50/a.pt:w"], new) == {new[0]: old[1]}


words = st.text("abcxyz_.", min_size=1, max_size=8)
paths = st.lists(words, min_size=1, max_size=3).map("/".join)


@given(
    st.lists(st.tuples(paths, words), min_size=1, max_size=8, unique=True),
    st.sampled_from(["global_step{}", "checkpoint-{}", "iter_{:07}", "x/step_{:04}", "ckpt_{}/y"]),
    st.integers(0, 10**7),
    st.integers(0, 10**7),
)
def test_any_tree_below_a_step_is_found_again(
    tree: list[tuple[str, str]], top: str, one: int, other: int
) -> None:
    old = [f"{top.format(one)}/{path}.pt:{name}" for path, name in tree]
    new = [f"{top.format(other)}/{path}.pt:{name}" for path, name in tree]
    assert alike(old, new) == pair_names(old, new) == dict(zip(new, old, strict=True))


@given(st.lists(st.text(max_size=20), unique=True), st.lists(st.text(max_size=20), unique=True))
def test_any_names_go_with_one_other_or_none(old: list[str], new: list[str]) -> None:
    found, pairs = alike(old, new), pair_names(old, new)
    for names in (found, pairs):
        assert set(names) <= set(new)
        assert set(names.values()) <= set(old)
        assert all(names[name] == name for name in set(old) & set(new))
    assert len(set(pairs.values())) == len(pairs)
