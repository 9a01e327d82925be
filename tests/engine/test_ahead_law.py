"""One step ahead changes nothing: at depth 1 every request gives the tokens and the bits that it gives at depth 0."""

from pathlib import Path
from typing import Any

import pytest

from hetis.core.sampling_params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_fleet import LocalFleet, RandomDispatcher
from tests.engine.test_continuation_law import PARAMS
from tests.engine.test_parity import VOCAB, prompts

ENDING = {
    "temperature": 0.9,
    "logprobs": 2,
    "presence_penalty": 0.5,
    "min_tokens": 3,
    "stop_token_ids": tuple(range(0, VOCAB, 6)),
}

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "five_groups")


def fleet_at(depth: int, directory: Path, plan: str = "1+0", **options: Any) -> LocalFleet:
    options = {"block_size": 4, "max_num_batched_tokens": 64, "dispatcher": RandomDispatcher(5)} | options
    return LocalFleet(directory, plan, async_scheduling=bool(depth), **options)


@pytest.mark.parametrize("plan", ["1+0", "1+2", "2+0", "3+2"])
def test_tokens_and_log_probabilities_have_the_same_bits(directory: Path, plan: str) -> None:
    """Requests of every kind side by side. Primaries that share a stage get the drawn tokens from the first one."""
    kinds = [SamplingParams(**({"max_tokens": 16, "ignore_eos": True} | fields)) for fields in PARAMS.values()]
    texts = prompts()[: len(kinds)]
    with fleet_at(0, directory, plan) as fleet:
        expected = fleet.generate(texts, kinds)
        assert fleet.most_in_flight == 1
    with fleet_at(1, directory, plan) as fleet:
        found = fleet.generate(texts, kinds, check=True)
        assert fleet.most_in_flight == 2
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert (one.rows, one.prompt_rows) == (other.rows, other.prompt_rows)


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_nothing_of_a_sequence_reaches_the_next_one_in_its_slot(directory: Path, max_num_seqs: int) -> None:
    """Most end by a stop token, so that the step after it computes a row whose token is discarded; the next sequence in
    the slot has penalties, banned tokens and a seed of its own."""
    texts = [*prompts(), *prompts()]
    kinds = [SamplingParams(max_tokens=12 + index % 5, seed=index, **ENDING) for index in range(len(texts))]
    with fleet_at(0, directory) as fleet:
        expected = [fleet.generate([text], params)[0] for text, params in zip(texts, kinds, strict=True)]
    assert sum(one.finish_reason == "stop" for one in expected) > len(texts) // 2
    with fleet_at(1, directory, max_num_seqs=max_num_seqs) as fleet:
        found = fleet.generate(texts, kinds, check=True)
        fleet.drain()
        assert all(usage.pages_used == 0 for usage in fleet.engine.cache.usage().values())
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.rows, one.finish_reason) == (other.token_ids, other.rows, other.finish_reason)


def test_aborts_in_flight_leave_other_requests_alone(directory: Path) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, repetition_penalty=1.2)
    with fleet_at(0, directory) as fleet:
        expected = [one.token_ids for one in fleet.generate(prompts(), params)]
    with fleet_at(1, directory, "1+2", max_num_seqs=5) as fleet:
        for index, prompt in enumerate(prompts()):
            fleet.engine.add(fleet.request(str(index), prompt, params), 0.0)
        outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts()))}
        ended: dict[str, str] = {}
        while len(ended) < len(outputs):
            fleet.turn(check=True)
            for new in fleet.engine.take_outputs():
                assert new.id not in ended, "an output after the last one"
                outputs[new.id] += new.token_ids
                if new.finish_reason is not None:
                    ended[new.id] = new.finish_reason
                elif int(new.id) % 2 and len(outputs[new.id]) == int(new.id):
                    fleet.engine.abort(new.id)
        fleet.drain()
        assert all(usage.pages_used == 0 for usage in fleet.engine.cache.usage().values())
    for index, tokens in enumerate(expected):
        is_aborted = index % 2 == 1
        assert ended[str(index)] == ("abort" if is_aborted else "length")
        assert outputs[str(index)] == tokens[: index if is_aborted else None]


def test_steps_with_several_stages_are_micro_batches(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"stages": [{"layers": 1, "primaries": [{}]}, {"primaries": [{}]}], "attention": []}')
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with fleet_at(1, directory, str(path)) as fleet:
        fleet.generate(prompts(), params, check=True)
        assert fleet.most_in_flight == 2
        fleet.most_in_flight = 0
        fleet.generate(prompts()[:1], params, check=True)
        assert fleet.most_in_flight == 1, "a sequence is in one micro-batch at most"
