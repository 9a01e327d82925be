"""Batching, chunked prefill, preemption, micro-batches: each request gives the tokens that it gives alone (float32)."""

import json
from pathlib import Path

import pytest

from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import LocalFleet
from tests.engine.test_parity import prompts

PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PAGE_BYTES = 3 * 2 * 4 * 32 * 4  # per page of 4 tokens

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module", params=["llama3", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint per family; Mistral's has a sliding window of 9 tokens."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    with LocalFleet(checkpoint, "1+0") as fleet:
        return [fleet.generate([prompt], PARAMS)[0].token_ids for prompt in prompts()]


def tokens(fleet: LocalFleet, params: SamplingParams = PARAMS) -> list[list[int]]:
    return [one.token_ids for one in fleet.generate(prompts(), params, check=True)]


@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize("max_num_batched_tokens", [7, 16, 1000])
def test_mixed_batches_and_chunked_prefill(max_num_batched_tokens: int, checkpoint: Path, alone: list[list[int]]):
    with LocalFleet(checkpoint, "1+2", max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=5) as fleet:
        assert tokens(fleet) == alone


@pytest.mark.usefixtures("depth")
def test_preemption_by_recompute(checkpoint: Path, alone: list[list[int]]):
    with LocalFleet(checkpoint, "1+1", dispatch="proportional", block_size=4, kv_cache_memory=40 * PAGE_BYTES) as fleet:
        assert tokens(fleet) == alone
        assert fleet.engine.scheduler.num_preemptions > 0


def test_a_recomputed_prompt_is_scored_once(checkpoint: Path):
    [prompt] = [prompt for prompt in prompts() if len(prompt) > 14][:1]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    with LocalFleet(checkpoint, "1+0", max_num_batched_tokens=7, async_scheduling=False) as fleet:
        [expected] = fleet.generate([prompt], params)
        fleet.engine.add(fleet.request("again", prompt, params), 0.0)
        for _ in range(2):
            fleet.turn()
        [sequence] = fleet.engine.scheduler.running
        assert 0 < sequence.num_computed < len(prompt)
        fleet.engine.scheduler.preempt(sequence)
        while not (outputs := fleet.engine.take_outputs()):
            fleet.turn()
    assert outputs[0].prompt_logprobs == expected.prompt_rows
    assert len(expected.prompt_rows) == len(prompt) - 1


@pytest.mark.usefixtures("depth")
def test_lanes_migrate_where_pages_run_out(checkpoint: Path, alone: list[list[int]]):
    memory = {0: 60 * PAGE_BYTES, 1: 400 * PAGE_BYTES}
    with LocalFleet(checkpoint, "1+1", clock=lambda: 0.0, block_size=4, kv_cache_memory=memory) as fleet:
        assert tokens(fleet) == alone
        assert fleet.engine.migrator.num_committed > 0
        assert fleet.engine.scheduler.num_preemptions == 0


@pytest.mark.usefixtures("depth")
def test_lanes_of_few_homes_migrate_where_pages_run_out(checkpoint: Path, alone: list[list[int]]):
    """Two head groups over three primaries: the third has no head group, and waits with a home whose pages run out."""
    memory = {0: 30 * PAGE_BYTES, 1: 400 * PAGE_BYTES, 2: 1, 3: 400 * PAGE_BYTES}
    with LocalFleet(checkpoint, "3+1", clock=lambda: 0.0, block_size=4, kv_cache_memory=memory) as fleet:
        assert tokens(fleet) == alone
        assert fleet.engine.migrator.num_committed > 0
        assert fleet.engine.scheduler.num_preemptions == 0
        assert fleet.engine.cache.usage()[2].pages_total == 0


def test_page_sizes(checkpoint: Path, alone: list[list[int]]):
    for block_size in (1, 3, 64):
        with LocalFleet(checkpoint, "1+1", block_size=block_size) as fleet:
            assert tokens(fleet) == alone


def test_micro_batches_over_stages(checkpoint: Path, alone: list[list[int]], tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"stages": [{"layers": n, "primaries": [{}]} for n in (1, 1, 1)], "attention": [{}]}))
    with LocalFleet(checkpoint, str(path), max_num_batched_tokens=48) as fleet:
        assert tokens(fleet) == alone
        assert fleet.most_in_flight == 3


def test_no_page_is_lost_when_idle(checkpoint: Path):
    with LocalFleet(checkpoint, "1+2") as fleet:
        tokens(fleet)
        assert all(usage.pages_used == 0 for usage in fleet.engine.cache.usage().values())


def test_a_prompt_that_can_never_fit_is_refused_at_once_and_the_others_go_on(checkpoint: Path, alone: list[list[int]]):
    with LocalFleet(checkpoint, "1+1", block_size=4, kv_cache_memory=40 * 3 * 2 * 4 * 32 * 4) as fleet:
        found = fleet.generate([[5] * 200, prompts()[0]], PARAMS)
    assert found[0].finish_reason == "error"
    assert "200 tokens" in (found[0].error or "")
    assert found[1].token_ids == alone[0]
