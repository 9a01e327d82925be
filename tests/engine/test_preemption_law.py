"""Preemption law: bit-identical logits whenever a sequence is preempted and recomputed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher
from tests.engine.test_parity import VOCAB, long_prompts, prompts

PARAMS = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=-1)
OPTIONS: dict[str, Any] = {"block_size": 4, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 64}


class UnsteadyFleet(LocalFleet):
    """Preempts sequences at random; their new placements are random too. For a sequence in flight in a plan of one
    stage it takes the results of all steps first: there most sequences are in flight all the time."""

    def __init__(self, directory: Path, plan: str, likelihood: float, **options: Any) -> None:
        super().__init__(directory, plan, dispatcher=RandomDispatcher(3), **options)
        self._random, self._likelihood = random.Random(3), likelihood
        self._can_drain = len(self.setup.plan.stages) == 1

    def turn(self, *, check: bool = False) -> None:
        scheduler = self.engine.scheduler
        for sequence in scheduler.running:
            if (self._can_drain or not sequence.in_flight) and self._random.random() < self._likelihood:
                if self._can_drain:
                    self.drain()
                if sequence in scheduler.running:
                    scheduler.preempt(sequence)
        super().turn(check=check)


def assert_same(found: list[Generated], expected: list[Generated]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.logits(VOCAB), other.logits(VOCAB))


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["five_groups", "mistral"])
def test_recompute_does_not_change_a_bit(family: str, dtype: str, tmp_path: Path) -> None:
    """Outputs are recomputed in pieces, at eight decode tokens per step. Mistral has a sliding window."""
    directory = make_checkpoint(tmp_path, family)
    options = OPTIONS | {"dtype": dtype, "max_num_seqs": 8}
    with LocalFleet(directory, "1+0", **options) as fleet:
        expected = fleet.generate(prompts(), PARAMS)
    with UnsteadyFleet(directory, "1+2", 0.05, **options) as fleet:
        assert_same(fleet.generate(prompts(), PARAMS, check=True), expected)
        assert fleet.engine.scheduler.num_preemptions > 10


@pytest.mark.usefixtures("depth")
def test_recompute_of_split_lanes(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "five_groups", max_position_embeddings=1024, num_hidden_layers=2)
    options = OPTIONS | {"max_num_batched_tokens": 700, "kv_cache_memory": 16 << 20}
    with LocalFleet(directory, "1+0", **options) as fleet:
        expected = fleet.generate(long_prompts(), PARAMS)
    with UnsteadyFleet(directory, "1+2", 0.06, **options) as fleet:
        assert_same(fleet.generate(long_prompts(), PARAMS), expected)
        assert fleet.engine.scheduler.num_preemptions > 2


def test_recompute_on_several_homes_and_stages(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "five_groups")
    homes = [{"head_groups": 3}, {"head_groups": 2}]
    stages = [{"layers": 2, "primaries": homes}, {"primaries": [{}]}]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"stages": stages, "attention": [{}]}))
    with LocalFleet(directory, str(path), dispatcher=RandomDispatcher(None), **OPTIONS) as fleet:
        expected = fleet.generate(prompts(), PARAMS)
    with UnsteadyFleet(directory, str(path), 0.05, **OPTIONS) as fleet:
        assert_same(fleet.generate(prompts(), PARAMS, check=True), expected)
        assert fleet.engine.scheduler.num_preemptions > 10
