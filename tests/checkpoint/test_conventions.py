"""Names and keys of real tools: what is a step, and what is none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptvcs.checkpoint.conventions import (
    Kind,
    epoch_in_keys,
    is_alias,
    named_step,
    number_in_name,
    read_numbers,
    stem,
    step_in_keys,
    step_in_name,
    step_in_text,
)

NAMED = {
    # fairseq and metaseq: epoch, updates
    "checkpoint_6_182000.pt": 182000,
    "checkpoint_1_1000-shard0.pt": 1000,
    "checkpoint_23_22500-model_part-0-shard1.pt": 22500,
    "checkpoint_1_1000-rank-3-shard0.pt": 1000,
    "checkpoint_1_1000-shared-shard0.pt": 1000,
    "checkpoint_3_3.pt": 3,
    # composer
    "ep0-ba200-rank0.pt": 200,
    "ep12-ba2000-rank7.pt": 2000,
    "ep3-ba1200": 1200,
    # Lightning, NeMo
    "epoch=3-step=12000.ckpt": 12000,
    "epoch=3-step=1000-v1.ckpt": 1000,
    "epoch=0-step=100-v2.ckpt": 100,
    "model-step=500-val_loss=0.31.ckpt": 500,
    "megatron_gpt--val_loss=2.50-step=1000-consumed_samples=256000.0-last.ckpt": 1000,
    # published trajectories
    "step143000": 143000,
    "step0": 0,
    "step1000-tokens4B": 1000,
    "step-001000-2BT": 1000,
    "stage1-step140000-tokens294B": 140000,
    "stage1-step896000": 896000,
    "stage2-ingredient1-step23852-tokens51B": 23852,
    "ckpt_356": 356,
    "ckpt-360": 360,
    "global_step5000": 5000,
    "multiberts-seed_0-step_100k": 100_000,
    "multiberts-seed_4-step_0k": 0,
    "google_multiberts-seed_3-step_2000k": 2_000_000,
    "pythia-70m-step1000": 1000,
    "TinyLlama-1.1B-step-50K-105b": 50_000,
    "intermediate-step-1431k-3T": 1_431_000,
    "CrystalCoder_phase1_checkpoint_055500": 55500,
    "step_1M.pt": 1_000_000,
    # Hugging Face, lerobot, accelerate
    "checkpoint-500": 500,
    "checkpoint-130000-epoch-9": 130000,
    "step-002500": 2500,
    "step_900": 900,
    "checkpoint-1000 copy.pt": 1000,
    "checkpoint_500_7b.pt": 500,
    "checkpoint-100k": 100_000,
    # DeepSpeed, Megatron, torchtitan, torchtune, verl, GPT-NeoX
    "global_step100_universal": 100,
    "global_step0020.bin": 20,
    "iter_0001000": 1000,
    "iter_1000.pth": 1000,
    "step-1000": 1000,
    "global_step_100": 100,
    "step1000-unsharded": 1000,
    "epoch0epochstep9globalstep9": 9,
    "checkpoint_000010": 10,
    # guided diffusion, DiT, EDM, detectron2, DINOv2: padded numbers
    "ema_0.9999_010000.pt": 10000,
    "model010000.pt": 10000,
    "opt010000.pt": 10000,
    "0050000.pt": 50000,
    "training-state-010035.pt": 10035,
    "model_0004999.pth": 4999,
    "model_0012499.rank_0.pth": 12499,
    # mmengine, VISSL, OpenNMT, kohya, lit-gpt, stable-baselines
    "iter_20000.pth": 20000,
    "best_mIoU_iter_20000.pth": 20000,
    "model_iter_30.pth": 30,
    "model_iteration5000.torch": 5000,
    "model_step_10000.pt": 10000,
    "iter-001000-ckpt.pth": 1000,
    "mylora-step00000500.safetensors": 500,
    "rl_model_10000_steps.zip": 10000,
    "rl_model_replay_buffer_10000_steps.pkl": 10000,
    "500k_steps.pt": 500_000,
    "update_300.pt": 300,
    "checkpoint_0199.pth.tar": 199,
    "checkpoint_7.tar": 7,
    # beside other numbers
    "lr1e-4_bs32_step500.pt": 500,
    "2023-01-15_step_100.pt": 100,
    "step20200130.pt": 20200130,
    "step_1000_2.pt": 1000,
    "model-v2-step-300.pt": 300,
    "run3_seed42_step7.pt": 7,
    "resnet50_step100.pth": 100,
    "gpt2-checkpoint-300": 300,
    "Step_12.PT": 12,
    "step 40.pt": 40,
}

PLAIN = {  # what neither a word nor the checkpoint calls a step
    "model-100-bf16.pt": 100,
    "net-0500-ema.pt": 500,
    "1000.pt": 1000,
    "7.pt": 7,
    "7-1999.ckpt": 1999,
    "myrun_1000.pt": 1000,
    "nanolm-500.pt": 500,
    "G_10000.pth": 10000,
    "D_800.pth": 800,
    "net_g_5000.pth": 5000,
    "best_model_1234.pth": 1234,
    "best_4000.pt": 4000,
    "resnet50_20000.pth": 20000,
    "checkpoint0099.pth": 99,
    "checkpoint6.pt": 6,
    "model_v2_1000.pt": 1000,
    "unet_500.pt": 500,
}

NONE = [
    "checkpoint_best.pt",
    "checkpoint_last.pt",
    "checkpoint.best_loss_3.45.pt",
    "model_final.pth",
    "checkpoint_last-model_part-0-shard3.pt",
    "latest-rank0.pt",
    "ep1-rank0.tar",
    "last.ckpt",
    "last-v2.ckpt",
    "best.pt",
    "model_best.pth.tar",
    "epoch=03-val_loss=0.25.ckpt",
    "epoch_12.pth",
    "megatron_gpt--val_loss=2.50-epoch=0-consumed_samples=256000.0",
    "epoch10.pt",
    "12epoch.pth",
    "best_coco_bbox_mAP_epoch_12.pth",
    "valid.acc.ave_10best.pth",
    "snapshot.ep.12",
    "epoch_3.pt",
    "checkpoint_epoch_00012.pyth",
    "model_state_epoch_3.th",
    "model_state_e3_b1000.th",
    "model_state_epoch_3.1596.th",
    "100_net_G.pth",
    "model_phase12.torch",
    "hf_model_0001_0.pt",
    "consolidated.00.pth",
    "pytorch_model-00001-of-00004.bin",
    "model-00004-of-00004.safetensors",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "rank0.pt",
    "model_world_size_8_rank_0.pt",
    "bf16_zero_pp_rank_3_mp_rank_01_optim_states.pt",
    "resnet50-0676ba61.pth",
    "resnet18-f37072fd.pth",
    "vgg16-397923af.pth",
    "resnet50.pth",
    "mobilenet_v2-7ebf99e0.pth",
    "densenet121-a639ec97.pth",
    "vit_base_patch16_224.pth",
    "swin_tiny_patch4_window7_224.pth",
    "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth",
    "sd-v1-4.ckpt",
    "v1-5-pruned-emaonly.ckpt",
    "llama-2-7b.pt",
    "gpt2.pt",
    "gpt-v2.pt",
    "t5-3b.bin",
    "opt-125m.bin",
    "pythia-410m",
    "Mixtral-8x7B-v0.1",
    "Qwen2.5-0.5B.safetensors",
    "model-7b.pt",
    "model-bf16.pt",
    "model-fp16.safetensors",
    "model-q4.bin",
    "loss-0.25.pt",
    "model (1).pt",
    "CKPT+2021-05-01+12-30-45+00",
    "model_20230115.pt",
    "2023-01-15_10-30-00.pt",
    "fold_3.pt",
    "a1b2c3d4e5f60718.pt",
    "123e4567-e89b-12d3-a456-426614174000.pt",
    "seed42.pt",
    "model.pt",
    "lora_r16_alpha32.pt",
    "lr1e-4_bs32.pt",
    "1.2M_steps.pt",
    "model-v3.pt",
    "other-10.pt",
    "checkpoint-v2.pt",
    "ckpt.pt",
    "optimizer.pt",
    "stage2.pt",
    "tokens294B.pt",
]


@pytest.mark.parametrize(("name", "step"), NAMED.items())
def test_steps_that_names_call_so(name: str, step: int) -> None:
    assert named_step(name) == step
    assert step_in_name(name) == step


@pytest.mark.parametrize(("name", "number"), PLAIN.items())
def test_numbers_that_can_hardly_be_anything_else(name: str, number: int) -> None:
    assert named_step(name) is None
    assert number_in_name(name) == number


@pytest.mark.parametrize("name", NONE)
def test_numbers_that_are_no_steps(name: str) -> None:
    assert named_step(name) is None
    assert step_in_name(name) is None
    assert number_in_name(name) is None


@pytest.mark.parametrize("name", ["checkpoint-12.pth.tar", "model_000012.pt", "checkpoint_0012.pt"])
@pytest.mark.parametrize("epoch", [11, 12, 13])
def test_the_epoch_that_a_checkpoint_gives_is_not_its_step(name: str, epoch: int) -> None:
    assert named_step(name, None, None) == 12
    assert named_step(name, None, epoch) is None
    assert step_in_name(name, epoch) is None
    assert named_step(name, 12, epoch) == 12  # the checkpoint itself says that it is
    assert named_step(name, None, 5) == 12


def test_a_number_that_is_called_a_step_is_one_at_any_epoch() -> None:
    assert named_step("step-12.pt", None, 12) == 12
    assert number_in_name("model-12.pt", 12) is None
    assert step_in_name("checkpoint6.pt", 6) is None
    assert step_in_name("checkpoint6.pt", 2) == 6


def test_each_number_of_a_name_is_something() -> None:
    def kinds(name: str) -> list[tuple[int, Kind]]:
        return [(one.value, one.kind) for one in read_numbers(name)]

    assert kinds("ep3-ba200-rank1") == [(3, Kind.EPOCH), (200, Kind.STEP), (1, Kind.SHARD)]
    assert kinds("checkpoint_23_22500-model_part-0-shard1") == [
        (23, Kind.EPOCH),
        (22500, Kind.CHECKPOINT),
        (0, Kind.SHARD),
        (1, Kind.SHARD),
    ]
    assert kinds("model-00002-of-00004") == [(2, Kind.SHARD)]
    assert kinds("ema_0.9999_000500") == [(500, Kind.NUMBER)]
    assert kinds("seed_3-step_10k") == [(3, Kind.OTHER), (10_000, Kind.STEP)]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("a.pth.tar", "a"),
        ("a.pt", "a"),
        ("loss-0.25.ckpt", "loss-0.25"),
        (".pt", ".pt"),
        ("step.1000", "step.1000"),
        ("A.PT", "A"),
        ("a.safetensors", "a"),
        ("tar", "tar"),
    ],
)
def test_names_without_their_endings(name: str, short: str) -> None:
    assert stem(name) == short


@pytest.mark.parametrize(
    ("state", "step", "epoch"),
    [
        ({"step": 5}, 5, None),
        ({"global_steps": 7, "epoch": 2}, 7, 2),
        ({"iter_num": 3}, 3, None),
        ({"iteration": 4}, 4, None),
        ({"meta": {"iter": 60, "epoch": 3}}, 60, 3),
        ({"optimizer_history": [{"num_updates": 1}, {"num_updates": 9}]}, 9, None),
        ({"state": {"timestamp": {"batch": 200, "epoch": 1}}}, 200, 1),
        ({"state": {"timestamp": {"Timestamp": {"batch": 200}}}}, 200, None),
        ({"step": True}, None, None),
        ({"step": -1}, None, None),
        ({"step": 1 << 62}, None, None),
        ({"step": 1.0, "epoch": "3"}, None, None),
        ({"optimizer_history": []}, None, None),
        ({"step": None, "global_step": 6}, 6, None),
        ([{"step": 5}], None, None),
        (None, None, None),
    ],
)
def test_steps_and_epochs_that_a_checkpoint_gives(
    state: Any, step: int | None, epoch: int | None
) -> None:
    assert step_in_keys(state) == step
    assert epoch_in_keys(state) == epoch


def test_steps_in_messages() -> None:
    assert step_in_text("after step 2000, before the spike") == 2000
    assert step_in_text("global_step=40") == 40
    assert step_in_text("footstep 3") is None
    assert step_in_text("epoch 3") is None


def test_names_that_are_written_again_and_again() -> None:
    for name in (
        "best.pt",
        "last.ckpt",
        "checkpoint_last-shard0.pt",
        "latest-rank3.pt",
        "final.pt",
    ):
        assert is_alias(name)
    for name in ("best_step_3.pt", "step-3.pt", "contrast.pt", "lastly.pt", "best_model_1000.pt"):
        assert not is_alias(name)


@given(st.text(max_size=80))
def test_any_name_can_be_read(name: str) -> None:
    for one in read_numbers(name):
        digits = name[one.start : one.end]
        assert digits.isdecimal()
        assert digits.isascii()
        assert one.value in (int(digits), int(digits) * 1000, int(digits) * 1_000_000)
    for number in (named_step(name), step_in_name(name), number_in_name(name)):
        assert number is None or 0 <= number < 1 << 62


@given(
    st.sampled_from(["step", "global_step", "iter", "iters", "checkpoint-", "ckpt_", "update_"]),
    st.integers(0, 10**9),
    st.integers(0, 9),
    st.sampled_from(["", "-", "_", "="]),
    st.sampled_from(["", "seed3_", "7b-", "v2-", "2024-01-02_", "epoch4-", "bf16_", "lr3e-4_"]),
    st.sampled_from(["", "-tokens5B", "-rank3", "_ema", "-v1", "-0676ba61", "-2BT", "-of-me"]),
    st.sampled_from(["", ".pt", ".pth.tar", ".ckpt", ".safetensors"]),
)
def test_a_step_is_found_among_other_numbers(
    word: str, step: int, zeros: int, between: str, before: str, behind: str, ending: str
) -> None:
    between = between if word[-1].isalpha() else ""
    name = f"{before}{word}{between}{'0' * zeros}{step}{behind}{ending}"
    assert named_step(name) == step


def test_a_text_that_is_too_long_for_a_name_is_not_searched() -> None:
    assert named_step("a-" * 2000 + "step-7") == 7
    assert read_numbers("a-" * 3000 + "step-7") == ()
