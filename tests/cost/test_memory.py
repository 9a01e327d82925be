"""The memory ledger: pages, largest contexts and refusals, compared with a search that places lanes one by one."""

import random

import msgspec
import pytest

from hetis.core.device_info import DeviceInfo
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.plan_sources import split_evenly
from hetis.cost.footprint import activation_bytes, page_bytes, page_bytes_of
from hetis.cost.limits import Limits
from hetis.cost.memory import MemoryLedger, largest_context, plan_memory, total_tokens
from tests.core.test_plan import SPEC

GIB = 2**30
PAGE = 16


def fleet(plan: Plan, free: int = 4 * GIB, host: str = "here") -> list[DeviceInfo]:
    return [
        DeviceInfo(
            rank=member.rank,
            device=member.device,
            name="a device",
            host=host,
            address="",
            pid=1,
            num_threads=1,
            total_memory=free,
            free_memory=free,
        )
        for member in plan.members
    ]


def ledger_of(plan: Plan, infos: list[DeviceInfo], spec: ModelSpec = SPEC, **changes: int) -> MemoryLedger:
    numbers = {"block_size": PAGE, "max_num_batched_tokens": 64, "max_num_seqs": 4} | changes
    return plan_memory(spec, plan, infos, dtype="bfloat16", **numbers)


def test_a_page_holds_key_and_value_of_all_layers_of_the_stage() -> None:
    stage = split_evenly("1+0", SPEC, "cpu").stages[0]
    assert page_bytes(SPEC, stage.num_layers, PAGE, "bfloat16") == 7 * 2 * PAGE * 32 * 2


def test_pages_and_tokens_follow_from_kv_memory() -> None:
    plan = split_evenly("2+1", SPEC, "cpu", "1MiB")
    ledger = ledger_of(plan, fleet(plan))
    page = page_bytes(SPEC, plan.stages[0].num_layers, PAGE, "bfloat16")
    assert ledger.num_pages == dict.fromkeys(range(3), 2**20 // page)
    primary, worker = ledger.ranks[0], ledger.ranks[2]
    assert (primary.pages, primary.tokens, worker.tokens) == (73, 73 // 4 * PAGE, 73 // 8 * PAGE)
    assert ledger.largest_context == 73 // 4 * PAGE
    assert ledger.total_tokens == 3 * 73 // 8 * PAGE
    assert worker.weights == 0
    assert worker.buffers > 0


def test_a_worker_splits_its_memory_over_the_stages() -> None:
    primaries = split_evenly("1+0", SPEC, "cpu").stages[0].primaries
    stages = (Stage(layers=(0, 2), primaries=primaries), Stage(layers=(2, 7), primaries=primaries))
    plan = Plan(stages=stages, workers=(AttentionWorker(rank=2, device="cpu"),))
    assert page_bytes_of(SPEC, plan, plan.workers[0], PAGE, "float32") == 7 * 2 * PAGE * 32 * 4


def test_ranks_of_a_device_share_its_memory_if_no_size_is_given() -> None:
    long = {"max_model_len": 512, "max_num_seqs": 10**6}
    plan = split_evenly("1+2", SPEC, "cpu")
    infos = fleet(plan, free=64 * 2**20)
    together = ledger_of(plan, infos, max_num_batched_tokens=8, max_model_len=512)
    assert sum(rank.kv + rank.weights + rank.activations + rank.buffers for rank in together.ranks) <= 32 * 2**20
    apart = [info if info.rank < 2 else msgspec.structs.replace(info, host="there") for info in infos]
    assert ledger_of(plan, apart, max_num_batched_tokens=8).num_pages[2] >= together.num_pages[2]
    with pytest.raises(ValueError, match="activations"):
        ledger_of(plan, infos, **long)


def test_no_more_memory_is_allocated_than_sequences_can_use() -> None:
    plan = split_evenly("1+1", SPEC, "cpu")
    ledger = ledger_of(plan, fleet(plan, free=100 * GIB), max_num_seqs=3, max_model_len=100)
    assert ledger.num_pages == {0: 3 * 8 * 7, 1: 3 * 8 * 7}  # sequences x groups x pages of 100 tokens


def test_primaries_without_head_groups_need_no_pages() -> None:
    """Their device's memory is left to ranks that hold KV; a size given for every rank does not apply to them."""
    mqa = msgspec.structs.replace(SPEC, num_query_heads=2, num_head_groups=1)
    plan = split_evenly("3+1", mqa, "cpu", "1MiB")
    ledger = ledger_of(plan, fleet(plan), mqa)
    assert ledger.num_pages == {0: 73, 1: 0, 2: 0, 3: 73}
    assert [(rank.kv, rank.tokens) for rank in ledger.ranks[1:3]] == [(0, 0), (0, 0)]
    assert all(rank.weights > 0 and rank.activations > 0 for rank in ledger.ranks[:3])
    assert (ledger.largest_context, ledger.total_tokens) == (512, 2 * 73 * PAGE)
    with pytest.raises(
        ValueError, match=r"rank 0 has 98\.00 KiB of KV memory \(as given\) for 1 head group; give it 448"
    ):
        ledger_of(split_evenly("3+1", mqa, "cpu", {0: 2**20 // 10}), fleet(plan), mqa, max_model_len=500)

    together = split_evenly("2+0", mqa, "cpu")
    found = ledger_of(together, fleet(together, free=160 * 2**20), mqa, max_num_seqs=1000)
    used = sum(rank.kv + rank.weights + rank.activations + rank.buffers for rank in found.ranks)
    assert found.num_pages[1] == 0
    assert 80 * 2**20 - found.ranks[0].page_bytes < used <= 80 * 2**20, "nothing is set aside for rank 1"

    apart = split_evenly("2+0", mqa, ["cuda:0", "cuda:1"])
    infos = [msgspec.structs.replace(info, free_memory=2**20) if info.rank else info for info in fleet(apart)]
    with pytest.raises(ValueError, match=r"rank 1 on cuda:1.*weights.*do not fit into 90%"):
        ledger_of(apart, infos, mqa)


def test_plans_that_do_not_fit_are_refused_with_the_numbers() -> None:
    plan = split_evenly("2+1", SPEC, "cpu", "1GiB")
    match = r"ranks 0, 1, 2 on cpu 3.00 GiB together.*more than the 1.98 GiB that are left"
    with pytest.raises(ValueError, match=match) as refusal:
        ledger_of(plan, fleet(plan, free=2 * GIB))
    assert "\n" not in str(refusal.value)
    on_gpu = split_evenly("1+0", SPEC, "cuda:0")
    with pytest.raises(ValueError, match=r"rank 0 on cuda:0: .*weights.*90% of 1.00 MiB"):
        ledger_of(on_gpu, fleet(on_gpu, free=2**20))


def test_less_than_one_page_per_lane_is_refused() -> None:
    page = page_bytes(SPEC, split_evenly("1+0", SPEC, "cpu").stages[0].num_layers, PAGE, "bfloat16")
    short = split_evenly("1+0", SPEC, "cpu", 8 * page - 1)
    with pytest.raises(ValueError, match=r"rank 0 on cpu.*7 pages.*at least 8"):
        ledger_of(short, fleet(short))
    enough = split_evenly("1+0", SPEC, "cpu", 8 * page)
    assert ledger_of(enough, fleet(enough)).largest_context == PAGE
    idle_worker = split_evenly("1+1", SPEC, "cpu", {0: 8 * page, 1: page - 1})
    with pytest.raises(ValueError, match=r"rank 1 on cpu.*0 pages.*at least 1"):
        ledger_of(idle_worker, fleet(idle_worker))


def test_a_context_that_does_not_fit_is_refused() -> None:
    plan = split_evenly("2+1", SPEC, "cpu", {0: "1GiB", 1: "1MiB", 2: "1GiB"})
    match = (
        r"max_model_len is 400.*largest context is 288.*rank 1 has 1022\.00 KiB.*as given.*4 head.*give it 1\.37 MiB"
    )
    with pytest.raises(ValueError, match=match) as refusal:
        ledger_of(plan, fleet(plan), max_model_len=400)
    table = str(refusal.value).splitlines()[1:]
    assert [line.split()[0] for line in table] == ["rank", "0", "1", "2", "largest"], "every rank's numbers follow"
    with pytest.raises(ValueError, match=r"max_model_len is 513.*512 positions"):
        ledger_of(plan, fleet(plan), max_model_len=513)
    assert ledger_of(plan, fleet(plan), max_model_len=288).largest_context == 288


def test_a_refused_context_fits_into_the_memory_that_the_error_names() -> None:
    plan = split_evenly("1+0", SPEC, "cpu")
    alone = ledger_of(plan, fleet(plan), max_model_len=512).ranks[0]
    infos = fleet(plan, 2 * (alone.weights + alone.activations + alone.buffers + 2**20))
    with pytest.raises(ValueError, match=r"what the rest leaves of 50% of the free memory") as refusal:
        ledger_of(plan, infos, max_model_len=512)
    asked = str(refusal.value).partition("give it ")[2].partition(" by")[0].replace(" ", "")
    given = split_evenly("1+0", SPEC, "cpu", asked)
    assert ledger_of(given, infos, max_model_len=512).largest_context == 512


def test_the_table_names_every_rank_and_the_contexts() -> None:
    plan = split_evenly("1+1", SPEC, "cpu", {0: "1MiB", 1: "2MiB"})
    lines = str(ledger_of(plan, fleet(plan))).splitlines()
    columns = "rank role device threads cores free weights activations buffers KV pages tokens"
    assert " ".join(lines[0].split()) == columns
    assert "primary" in lines[1]
    assert "attention worker" in lines[2]
    assert "4.00 GiB" in lines[1]
    assert lines[-1] == "largest context 144 tokens; room for 432 tokens in all"
    assert len({len(line) for line in lines[:-1]}) == 1


def fits(plan: Plan, pages: dict[int, int], num_pages_of_lane: int) -> bool:
    """Whether a placement exists for a lane of `num_pages_of_lane` of every group, staging on its home included."""
    for stage in plan.stages:
        left = pages | {}
        for primary in stage.primaries:
            for _ in range(primary.num_groups):
                left[primary.rank] -= num_pages_of_lane  # on the home, as owner or for staging
        if min(left.values()) < 0:
            return False
    return True


def test_largest_context_is_the_longest_for_which_a_placement_exists() -> None:
    choose = random.Random(3)
    for _ in range(50):
        cut, group = choose.randint(1, 6), choose.randint(1, 7)
        spans = [((0, group), 0), ((group, 8), 1)]
        primaries = [
            tuple(
                Primary(rank=2 * stage + index, device="cpu", groups=groups, mlp_columns=(0, 1), vocab_rows=(0, 1))
                for groups, index in spans
            )
            for stage in range(2)
        ]
        stages = (Stage(layers=(0, cut), primaries=primaries[0]), Stage(layers=(cut, 7), primaries=primaries[1]))
        plan = Plan(stages=stages, workers=(AttentionWorker(rank=4, device="cpu"),))
        pages = {rank: choose.randint(8, 60) for rank in range(5)}
        longest = largest_context(plan, pages, PAGE) // PAGE
        assert fits(plan, pages, longest)
        assert not fits(plan, pages, longest + 1)
        assert total_tokens(SPEC, plan, pages, PAGE) >= longest * PAGE


def test_activations_grow_with_the_tokens_of_a_step() -> None:
    plan = split_evenly("2+1", SPEC, "cpu")
    bounds = Limits(dtype="float16", block_size=PAGE, max_num_batched_tokens=32, max_num_seqs=8, max_model_len=512)
    twice = msgspec.structs.replace(bounds, max_num_batched_tokens=64)
    for primary in plan.primaries:
        small, large = (activation_bytes(SPEC, plan, primary, limits) for limits in (bounds, twice))
        per_token = 2 * (3 * 64 + 4 * (2 + 2 + 2) * 32 + 3 * primary.num_mlp_columns)
        assert large - small == 32 * per_token
