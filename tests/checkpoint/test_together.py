"""Which files of a folder are one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint.conventions import named_step
from ckptvcs.checkpoint.grouping import family, group_files, missing_files

METASEQ = [f"checkpoint_1_500-model_part-{p}-shard{s}.pt" for p in (0, 1) for s in range(3)]


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("checkpoint_1_500-model_part-*-shard*.pt", METASEQ),
        ("checkpoint_last-shard*.pt", ["checkpoint_last-shard0.pt", "checkpoint_last-shard1.pt"]),
        ("ep0-ba200-rank*.pt", ["ep0-ba200-rank0.pt", "ep0-ba200-rank1.pt"]),
        ("model_0012499.rank_*.pth", ["model_0012499.rank_0.pth", "model_0012499.rank_1.pth"]),
        ("step9-*-of-00002.bin", ["step9-00001-of-00002.bin", "step9-00002-of-00002.bin"]),
        (
            "checkpoint_1_9-rank-*-shard*.pt",
            [
                "checkpoint_1_9-rank-0-shard0.pt",
                "checkpoint_1_9-rank-1-shard0.pt",
                "checkpoint_1_9-shared-shard0.pt",
            ],
        ),
        (
            "*010000.pt",
            ["ema_0.9999_010000.pt", "ema_0.999_010000.pt", "model010000.pt", "opt010000.pt"],
        ),
        ("*800.pth", ["D_800.pth", "G_800.pth"]),
        ("*5000.pth", ["net_d_5000.pth", "net_g_5000.pth"]),
        ("*epoch_3.th", ["model_state_epoch_3.th", "training_state_epoch_3.th"]),
        ("*5.pt", ["epoch_5.pt", "optimizer_5.pt", "stats_5.pt"]),
        ("*1000", ["model_1000.safetensors", "optimizer_1000.pt"]),
        ("run1_*step_7.pt", ["run1_model_step_7.pt", "run1_optim_step_7.pt"]),
        ("*best.pt", ["model_best.pt", "optimizer_best.pt"]),
        ("a-rank*.pt", ["a-rank1.pt", "a-rank2.pt", "a-rank3.pt"]),
        ("part*.pt", ["part1.pt", "part2.pt"]),
        (
            "*20-rank*.pt",
            ["model_20-rank0.pt", "model_20-rank1.pt", "optim_20-rank0.pt", "optim_20-rank1.pt"],
        ),
    ],
)
def test_files_of_one_checkpoint(name: str, members: list[str]) -> None:
    others = ["step-1.pt", "step-2.pt", "best.pt", "vae.safetensors", "checkpoint_9_9999-shard0.pt"]
    assert group_files([*others, *reversed(members)]) == {name: members}
    assert not missing_files(members)


@pytest.mark.parametrize(
    "names",
    [
        ["step-1.pt", "step-2.pt"],
        ["step-800.pt", "step-800-ema.pt"],
        ["best.pt", "last.pt"],
        ["seed1-step100.pt", "seed2-step100.pt"],
        ["fold_0.pt", "fold_1.pt"],
        ["model.pt", "ema.pt"],
        ["resnet18-f37072fd.pth", "resnet50-0676ba61.pth"],
        ["model-7b.pt", "model-13b.pt"],
        ["lora-rank8.pt", "lora-rank16.pt", "lora-rank64.pt"],
        ["rank4-step9.pt", "rank8-step9.pt"],
        ["epoch_1.pt", "epoch_2.pt"],
        ["model_1.pt", "optimizer_2.pt"],
        ["G_800.pth", "D_900.pth"],
        ["model-v1.pt", "model-v2.pt"],
        ["iter_1.pth", "epoch_1.pth"],
        ["rank.pt", "shard.pt"],
        ["checkpoint-500.pt", "checkpoint-500.safetensors"],
        ["a*.pt", "a-rank0.pt"],
    ],
)
def test_files_that_stand_for_themselves(names: list[str]) -> None:
    assert group_files(names) == {}


def test_a_name_that_a_file_has_is_not_given_to_a_group() -> None:
    assert group_files(["a-rank0.pt", "a-rank1.pt", "a-rank*.pt"]) == {}


@pytest.mark.parametrize(
    ("members", "missing"),
    [
        (["a-rank0.pt", "a-rank2.pt"], ["a-rank1.pt"]),
        (["a-rank1.pt", "a-rank3.pt"], ["a-rank2.pt"]),
        (["a-rank00.pt", "a-rank10.pt"], [f"a-rank{n:02}.pt" for n in range(1, 10)]),
        (["m-00002-of-00003.bin", "m-00001-of-00003.bin"], ["m-00003-of-00003.bin"]),
        (["m-00000-of-00003.bin", "m-00001-of-00003.bin"], ["m-00002-of-00003.bin"]),
        (
            ["o_world_size_2_rank_0.pt", "m_world_size_2_rank_0.pt", "m_world_size_2_rank_1.pt"],
            ["o_world_size_2_rank_1.pt"],
        ),
        ([name for name in METASEQ if name != METASEQ[4]], [METASEQ[4]]),
        (["model010000.pt", "opt010000.pt"], []),
        (["a-rank0.pt", "a-rank4000000000.pt"], []),  # nobody has so many
    ],
)
def test_files_that_are_missing_for_sure(members: list[str], missing: list[str]) -> None:
    assert missing_files(members) == missing


def test_families_are_names_without_steps() -> None:
    for one, other in (
        ("step-1.pt", "step-200.pt"),
        ("checkpoint_1_9-shard0.pt", "checkpoint_2_50-shard3.pt"),
        ("epoch=1-step=9.ckpt", "epoch=2-step=70.ckpt"),
        ("*010000.pt", "*020000.pt"),
        ("ep0-ba200-rank*.pt", "ep1-ba900-rank0.pt"),
        ("best.pt", "last.pt"),
        ("step9-*-of-00002.bin", "step20-00001-of-00002.bin"),
        ("checkpoint_last-shard*.pt", "checkpoint_3_90-shard*.pt"),
    ):
        assert family(one) == family(other)
    for one, other in (
        ("step-1.pt", "step-1-ema.pt"),
        ("step-1.pt", "checkpoint-1.pt"),
        ("a-v1.pt", "a-v2.pt"),
        ("seed1-step2.pt", "seed2-step2.pt"),
        ("best.pt", "step-1.pt"),
    ):
        assert family(one) != family(other)


# -- properties ------------------------------------------------------------------------------------

steps = st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True)
shards = st.integers(2, 5)


def _runs(steps: Sequence[int], count: int, form: str, width: int) -> dict[int, list[str]]:
    return {
        step: [form.format(step=step, shard=f"{shard:0{width}}") for shard in range(count)]
        for step in steps
    }


@given(
    steps,
    shards,
    st.integers(1, 4),
    st.randoms(),
    st.sampled_from(
        [
            "step-{step}-rank{shard}.pt",
            "checkpoint_3_{step}-model_part-0-shard{shard}.pt",
            "ep1-ba{step}-rank{shard}.pt",
            "global_step{step}.shard_{shard}.safetensors",
            "iter_{step:07}_mp_{shard}.pth.tar",
            "rank_{shard}_step_{step}.ckpt",
        ]
    ),
)
def test_shards_of_one_step_are_one_and_of_several_never(
    steps: list[int], count: int, width: int, random: object, form: str
) -> None:
    runs = _runs(steps, count, form, width)
    names = [name for members in runs.values() for name in members] + ["best.pt", "vae.bin"]
    random.shuffle(names)  # type: ignore[attr-defined]
    groups = group_files(names)
    assert sorted(map(tuple, groups.values())) == sorted(tuple(sorted(m)) for m in runs.values())
    for name, members in groups.items():
        assert not missing_files(members)
        if form != "checkpoint_3_{step}-model_part-0-shard{shard}.pt" or min(steps) >= 3:
            assert {named_step(name), *map(named_step, members)} == {named_step(members[0])}
            assert named_step(name) in steps
        assert family(name) == family(members[0])


@given(st.integers(3, 8), st.data())
def test_what_is_missing_between_others_is_named(count: int, data: st.DataObject) -> None:
    members = _runs([40], count, "step-{step}-rank{shard}.pt", 2)[40]
    gone = data.draw(st.sets(st.sampled_from(members[:-1]), max_size=count - 2))
    left = [name for name in members if name not in gone]
    first = [n for n in gone if n == members[0]]  # ranks may count from 1
    expected = sorted(gone - set(first)) if members[1] in left or gone != {members[0]} else []
    found = missing_files(left)
    assert set(expected) <= set(found) | set(first)
    assert set(found) <= gone


@given(st.lists(st.text(min_size=1, max_size=30), max_size=12, unique=True))
def test_any_names_are_grouped_once(names: list[str]) -> None:
    groups = group_files(names)
    grouped = [name for members in groups.values() for name in members]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= set(names)
    assert all(len(members) > 1 for members in groups.values())
    assert groups == group_files(names[::-1])
    for members in groups.values():
        missing_files(members)
