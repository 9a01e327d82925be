"""Placement law: the same tokens and bit-identical logits wherever lanes are placed."""

from pathlib import Path

import pytest
import torch

from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher
from tests.engine.test_parity import VOCAB, long_prompts, prompts

NUM_PLACEMENTS = 20
NUM_PLACEMENTS_OF_LONG_LANES = 2

pytestmark = pytest.mark.usefixtures("device")


def run(
    directory: Path,
    dtype: str,
    seed: int | None,
    plan: str = "1+3",
    texts: list[list[int]] | None = None,
    num_batched_tokens: int = 64,
) -> list[Generated]:
    """Greedy tokens with all logits. `seed`: of random placements; None: every lane on its home."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=-1)
    with LocalFleet(
        directory,
        plan,
        dispatcher=RandomDispatcher(seed),
        dtype=dtype,
        logprobs_mode="raw_logits",
        max_num_batched_tokens=num_batched_tokens,
        kv_cache_memory=16 << 20,
    ) as fleet:
        return fleet.generate(texts or prompts(), params)


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_placement_gives_bit_identical_logits(dtype: str, tmp_path: Path):
    directory = make_checkpoint(tmp_path, "five_groups")
    baseline = run(directory, dtype, None)
    for seed in range(NUM_PLACEMENTS):
        assert_equal(run(directory, dtype, seed), baseline)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_lanes_give_bit_identical_logits(dtype: str, tmp_path: Path):
    """The prompts are also cut into other chunks."""
    directory = make_checkpoint(tmp_path, "five_groups", max_position_embeddings=1024, num_hidden_layers=2)
    baseline = run(directory, dtype, None, texts=long_prompts(), num_batched_tokens=2048)
    for seed in range(NUM_PLACEMENTS_OF_LONG_LANES):
        assert_equal(run(directory, dtype, seed, texts=long_prompts(), num_batched_tokens=150), baseline)


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize(("family", "plan"), [("mqa", "2+2"), ("llama3", "3+1"), ("three_groups", "5+2")])
def test_primaries_without_head_groups_change_nothing(family: str, plan: str, tmp_path: Path):
    directory = make_checkpoint(tmp_path, family)
    baseline = run(directory, "bfloat16", None, plan)
    for seed in range(3):
        assert_equal(run(directory, "bfloat16", seed, plan), baseline)


def assert_equal(found: list[Generated], baseline: list[Generated]) -> None:
    for one, expected in zip(found, baseline, strict=True):
        assert one.token_ids == expected.token_ids
        assert torch.equal(one.logits(VOCAB), expected.logits(VOCAB))
