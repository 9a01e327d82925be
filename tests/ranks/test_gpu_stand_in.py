"""Whole ranks on a stand-in of a GPU: the Python code of a GPU's ranks, from warm-up to the last measurement."""

from pathlib import Path
from typing import Any

import pytest

from hetis.core.messages import Measure, MeasureLink, Setup
from hetis.core.sampling_params import SamplingParams
from hetis.ranks.primary import PrimaryRank
from hetis.ranks.rank import build_member, warm_up
from tests import cuda_stand_in
from tests.checkpoints import make_checkpoint
from tests.engine import local_fleet
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher

PROMPTS = [[5, 9, 2], [7] * 40, [3, 4], list(range(60)), [11] * 300]
PARAMS = [
    SamplingParams(max_tokens=6, seed=1, top_p=0.8, repetition_penalty=1.2, logit_bias={3: 2.0}, min_tokens=2),
    SamplingParams(max_tokens=6, seed=2, top_k=5, presence_penalty=0.5, logprobs=3),
    SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=2),
    SamplingParams(max_tokens=6, seed=3, min_p=0.1, frequency_penalty=0.3),
    SamplingParams(max_tokens=6, temperature=0, logprobs=1),
]


def generate(directory: Path, device: str) -> list[Generated]:
    options: dict[str, Any] = {"device": device, "dtype": "float32", "max_num_batched_tokens": 64}
    with LocalFleet(directory, "1+1", dispatcher=RandomDispatcher(3), **options) as fleet:
        return fleet.generate(PROMPTS, PARAMS)


def build_warm_up_and_measure(setup: Setup, rank: int, *arguments: Any) -> Any:
    member = build_member(setup, rank, *arguments)
    warm_up(member, setup)
    attention = member.measurer.measure(Measure(part="attention", seconds=0.01))
    assert attention.read_bytes_per_us > 0
    assert all(sample.time_us > 0 for sample in attention.attention)
    if isinstance(member, PrimaryRank):
        layers = member.measurer.measure(Measure(part="dense", seconds=0.01))
        assert layers.dense
        assert layers.prefill
    link = member.measurer.measure(MeasureLink(primary=0, worker=1, seconds=0.01))
    assert bool(link.request) == bool(link.reply) == isinstance(member, PrimaryRank)
    return member


def test_outputs_equal_those_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path, "five_groups", max_position_embeddings=512)
    expected = generate(directory, "cpu")
    monkeypatch.setattr(local_fleet, "build_member", build_warm_up_and_measure)
    monkeypatch.setattr("hetis.ranks.measuring.devices.COLD_BYTES", 1 << 20)
    with cuda_stand_in.gpu(monkeypatch):
        found = generate(directory, "cuda")
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert [len(row.values) for row in one.rows if row] == [len(row.values) for row in other.rows if row]
        assert len(one.prompt_rows) == len(other.prompt_rows)
