"""Migration does not change outputs: logits are bit-identical, whatever lanes move while sequences are generated."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hetis.core.placement import Move
from hetis.core.sampling_params import SamplingParams
from hetis.cost import links
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import Generated, LocalFleet, RandomDispatcher
from tests.engine.test_parity import VOCAB, long_prompts, prompts
from tests.ranks.unbuffered_link import unbuffered_pair

PAGE_BYTES = 4 * 2 * 32 * 4  # 4 tokens, K and V, 32 values of float32, one layer

pytestmark = pytest.mark.usefixtures("device")


class MigratingFleet(LocalFleet):
    """Starts random moves before every step."""

    def __init__(self, directory: Path, plan: str, seed: int, **options: Any) -> None:
        super().__init__(directory, plan, dispatcher=RandomDispatcher(seed), **options)
        self._random = random.Random(seed)
        self.started: list[Move] = []

    def turn(self, *, check: bool = False) -> None:
        engine, plan = self.engine, self.setup.plan
        for sequence in engine.scheduler.running:
            if not sequence.is_generating or engine.cache.is_moving(sequence.slot):
                continue
            for stage, owners in enumerate(engine.cache.owners(sequence.slot)):
                for group, source in enumerate(owners):
                    target = self._random.choice([plan.home_ranks[stage][group], *plan.worker_ranks])
                    if target != source and self._random.random() < 0.4:
                        move = Move(slot=sequence.slot, stage=stage, group=group, source=source, target=target)
                        self.started += engine.migrator.start([move])
        super().turn(check=check)


PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, logprobs=-1)
OPTIONS: dict[str, Any] = {"block_size": 4, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 64}


def baseline(directory: Path, dtype: str) -> list[Generated]:
    with LocalFleet(directory, "1+0", dtype=dtype, **OPTIONS) as fleet:
        return fleet.generate(prompts(), PARAMS)


def plan_file(directory: Path, *stages: list[int]) -> str:
    """A stage of two layers and one of the rest, with the given head groups on their primaries; two workers."""
    path = directory / "plan.json"
    primaries = [[{"head_groups": count} for count in counts] for counts in stages]
    first, second = ({"primaries": each} for each in primaries)
    path.write_text(json.dumps({"stages": [first | {"layers": 2}, second], "attention": [{}, {}]}))
    return str(path)


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize(("pages", "least"), [(2, 50), (5, 100), (100, 100)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_migration_does_not_change_a_bit(
    dtype: str, pages: int, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pages`: per link and step; with few, a lane migrates for many steps, and grows meanwhile."""
    directory = make_checkpoint(tmp_path, "five_groups")
    monkeypatch.setattr(links, "TRANSFER_BYTES", pages * PAGE_BYTES)
    expected = baseline(directory, dtype)
    with MigratingFleet(directory, "1+3", pages, dtype=dtype, **OPTIONS) as fleet:
        outputs = fleet.generate(prompts(), PARAMS, check=True)
        assert len(fleet.started) >= least
        assert fleet.engine.migrator.num_committed > least // 2
        homes = {0}
        kinds = {(move.source in homes, move.target in homes) for move in fleet.started}
        assert kinds == {(True, False), (False, True), (False, False)}
    for one, plain in zip(outputs, expected, strict=True):
        assert one.token_ids == plain.token_ids
        assert torch.equal(one.logits(VOCAB), plain.logits(VOCAB))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_migration_of_lanes_that_kernels_cut_does_not_change_a_bit(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path, "five_groups", max_position_embeddings=1024, num_hidden_layers=2)
    monkeypatch.setattr(links, "TRANSFER_BYTES", 40 * PAGE_BYTES)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=-1)
    options = OPTIONS | {"max_num_batched_tokens": 700, "kv_cache_memory": 16 << 20, "dtype": dtype}
    with LocalFleet(directory, "1+0", **options) as fleet:
        expected = fleet.generate(long_prompts(), params)
    with MigratingFleet(directory, "1+3", 3, **options) as fleet:
        outputs = fleet.generate(long_prompts(), params, check=True)
        assert sum(len(long_prompts()[move.slot]) > 256 for move in fleet.started) > 10  # slots in order of arrival
        assert fleet.engine.migrator.num_committed > 10
    for one, plain in zip(outputs, expected, strict=True):
        assert one.token_ids == plain.token_ids
        assert torch.equal(one.logits(VOCAB), plain.logits(VOCAB))


@pytest.mark.parametrize(
    ("family", "stages"),
    [("five_groups", [[3, 2], [5]]), ("mqa", [[0, 1], [1, 0]]), ("llama3", [[1, 0, 1], [0, 2]])],
)
def test_migration_between_several_homes_and_stages(
    family: str, stages: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over two homes round differently, so the tokens are compared with those of the same plan without moves."""
    check_several_homes(family, stages, tmp_path, monkeypatch)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_ranks_need_no_link_that_holds_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Two homes in a stage, two workers and relays between them: the order of messages alone prevents deadlocks."""
    monkeypatch.setattr("hetis.comm.links.local.local_pair", unbuffered_pair)
    check_several_homes("five_groups", [[3, 2], [5]], tmp_path, monkeypatch)


def check_several_homes(family: str, stages: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path, family)
    monkeypatch.setattr(links, "TRANSFER_BYTES", 2 * PAGE_BYTES)
    plan = plan_file(tmp_path, *stages)
    with LocalFleet(directory, plan, dispatcher=RandomDispatcher(None), **OPTIONS) as fleet:
        expected = fleet.generate(prompts(), PARAMS)
    with MigratingFleet(directory, plan, 7, **OPTIONS) as fleet:
        outputs = fleet.generate(prompts(), PARAMS, check=True)
        assert fleet.engine.migrator.num_committed > 0
    for one, plain in zip(outputs, expected, strict=True):
        assert one.token_ids == plain.token_ids
        assert torch.equal(one.logits(VOCAB), plain.logits(VOCAB))
