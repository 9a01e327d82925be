"""The index tensors of a step against plain loops over rows, tokens and head groups; both ends of a link agree."""

import random

import numpy as np
import pytest
import torch

from hetis.core.batch import Batch, Row
from hetis.core.messages.step_command import PageEntries, Step, decode, encode
from hetis.core.placement import Move, Placement, PoolId
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams
from hetis.ranks.pool import PagePool
from hetis.ranks.step_input import Route, StepPlanner

CPU = torch.device("cpu")
GROUPS, SLOTS, PAGE_SIZE = 5, 6, 4
LANE_PAGES = 16
NUM_PAGES = SLOTS * GROUPS * LANE_PAGES
WINDOWS = 0, 9  # of two layers
PRIMARY, WORKERS = 0, [2, 3]


def make_planner(rank: int) -> StepPlanner:
    pool = PagePool(
        PoolId(rank, 0),
        num_layers=len(WINDOWS),
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        head_dim=8,
        num_lanes=SLOTS * GROUPS,
        max_model_len=LANE_PAGES * PAGE_SIZE,
        dtype=torch.float32,
        device=CPU,
    )
    return StepPlanner(pool, GROUPS, SLOTS, WINDOWS, CPU)


def sequence(slot: int, prompt_len: int, num_tokens: int) -> Sequence:
    return Sequence(
        id=str(slot),
        token_ids=list(range(num_tokens)),
        prompt_len=prompt_len,
        params=SamplingParams(),
        max_tokens=1,
        seed=0,
        stop_ids=frozenset(),
        arrival=slot,
        slot=slot,
    )


class RandomStep:
    """Random owners of all lanes, pages of all lanes on all ranks, and rows."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.owners = {slot: [draw.choice([PRIMARY, *WORKERS]) for _ in range(GROUPS)] for slot in range(SLOTS)}
        order = draw.sample(range(SLOTS), SLOTS)
        num_decode = draw.randrange(SLOTS + 1)
        self.decode = [(slot, draw.randrange(50), draw.choice((1, 1, 5))) for slot in order[:num_decode]]
        self.prefill = []
        for slot in order[num_decode:]:
            start = draw.randrange(30)
            self.prefill.append((slot, start, draw.randrange(1, 20)))
        self.rows = self.decode + self.prefill
        self.is_cut = {slot: draw.random() < 0.5 for slot in range(SLOTS)}  # more tokens follow, so none is sampled
        self.pages = {rank: draw.sample(range(NUM_PAGES), NUM_PAGES) for rank in (PRIMARY, *WORKERS)}

    def seen_by(self, rank: int, committed: list[Move] | None = None) -> Step:
        batch_rows = []
        for index, (slot, start, count) in enumerate(self.rows):
            num_tokens = start + count + self.is_cut[slot]
            prompt_len = start if index < len(self.decode) else num_tokens
            samples = start + count == num_tokens
            batch_rows.append(
                Row(sequence=sequence(slot, prompt_len, num_tokens), start=start, count=count, samples=samples)
            )
        admitted = [] if committed else [(row.sequence, self.placement(row.sequence.slot)) for row in batch_rows]
        lanes, indices = np.divmod(np.arange(NUM_PAGES, dtype=np.int32), LANE_PAGES)
        pages = {
            PoolId(each, 0): PageEntries(lanes, indices, np.array(table, np.int32))
            for each, table in self.pages.items()
        }
        pages[PoolId(PRIMARY, 1)] = PageEntries(*np.array([[0], [0], [NUM_PAGES - 1]], dtype=np.int32))  # to be ignored
        batch = Batch(rows=batch_rows, admitted=admitted, released=[])
        return decode(encode(0, batch, committed=committed or [], pages=pages), rank)

    def placement(self, slot: int) -> Placement:
        return Placement(owners=(tuple(self.owners[slot]), (PRIMARY,) * GROUPS))

    def cell_of(self, rank: int, lane: int, position: int) -> int:
        return self.pages[rank][lane * LANE_PAGES + position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("span", [(0, 0), (3, 3), (GROUPS, GROUPS)])
def test_without_head_groups_there_are_tokens_alone(seed: int, span: tuple[int, int]) -> None:
    random_step, primary = RandomStep(seed), make_planner(PRIMARY)
    step = random_step.seen_by(PRIMARY)
    primary.apply(step)
    found = primary.primary_input(step, span, WORKERS)
    positions = [start + i for _, start, count in random_step.rows for i in range(count)]
    assert found.token_T.tolist() == found.position_T.tolist() == positions, "a token's id is its position here"
    assert found.num_tokens == len(positions) > 0
    assert (len(found.append), len(found.local), found.prefill, found.routes) == (0, 0, None, [])


@pytest.mark.parametrize("span", [(0, GROUPS), (2, 5), (1, 2)])
@pytest.mark.parametrize("seed", range(8))
def test_against_loops(seed: int, span: tuple[int, int]) -> None:
    random_step, primary = RandomStep(seed), make_planner(PRIMARY)
    step = random_step.seen_by(PRIMARY)
    first, width = span[0], span[1] - span[0]
    primary.apply(step)
    found = primary.primary_input(step, span, WORKERS)

    local, appended = [], []
    remote: dict[int, list[tuple[int, int, int]]] = {worker: [] for worker in WORKERS}
    decoded = [(slot, start + i) for slot, start, count in random_step.decode for i in range(count)]
    for token, (slot, position) in enumerate(decoded):
        for group in range(*span):
            lane, qkv = slot * GROUPS + group, token * width + group - first
            if random_step.owners[slot][group] == PRIMARY:
                local.append((lane, qkv, position + 1))
                appended.append((qkv, random_step.cell_of(PRIMARY, lane, position)))
            else:
                remote[random_step.owners[slot][group]].append((lane, qkv, position))
    prompts: dict[int, list[tuple[int, int, int]]] = {worker: [] for worker in WORKERS}
    token = len(decoded)
    for slot, start, count in random_step.prefill:
        for position in range(start, start + count):
            for group in range(*span):
                lane, qkv = slot * GROUPS + group, token * width + group - first
                appended.append((qkv, random_step.cell_of(PRIMARY, lane, position)))
                if random_step.owners[slot][group] != PRIMARY:
                    prompts[random_step.owners[slot][group]].append((lane, qkv, position))
            token += 1

    lanes = found.local
    assert list(zip(lanes.lane_U.tolist(), lanes.qkv_U.tolist(), lanes.length_U.tolist(), strict=True)) == local
    lengths = [length for *_, length in local]
    assert lanes.kv_tokens == (sum(lengths) + sum(min(length, WINDOWS[1]) for length in lengths)) / 2
    assert list(zip(found.append.qkv_A.tolist(), found.append.cell_A.tolist(), strict=True)) == appended
    assert (found.num_tokens, found.num_decode) == (token, len(decoded))
    if random_step.prefill:
        assert found.prefill is not None
        assert found.prefill.context_C.tolist() == [start + count for _, start, count in random_step.prefill]
        expected = [[slot * GROUPS + g for g in range(*span)] for slot, _, _ in random_step.prefill]
        assert found.prefill.lane_CG.tolist() == expected
    else:
        assert found.prefill is None
    routes = {route.peer: route for route in found.routes}
    for worker in WORKERS:
        check_link(random_step, span, worker, routes.get(worker), remote[worker], prompts[worker])


@pytest.mark.parametrize("seed", range(8))
def test_the_last_tokens_are_those_of_rows_that_reach_the_end(seed: int) -> None:
    random_step, primary = RandomStep(seed), make_planner(PRIMARY)
    step = random_step.seen_by(PRIMARY)
    primary.apply(step)
    expected, stop = [], 0
    for slot, _, count in random_step.rows:
        stop += count
        expected += [] if random_step.is_cut[slot] else [stop - 1]
    assert primary.primary_input(step, (0, GROUPS), WORKERS).last_token_I.tolist() == expected


def test_a_lane_lives_at_its_target_once_its_migration_is_committed() -> None:
    planner, random_step = make_planner(PRIMARY), RandomStep(0)
    planner.apply(random_step.seen_by(PRIMARY))
    before = planner.owners_BG.copy()
    here = Move(slot=3, stage=0, group=2, source=PRIMARY, target=WORKERS[1])
    elsewhere = Move(slot=3, stage=1, group=4, source=PRIMARY, target=WORKERS[0])
    planner.apply(random_step.seen_by(PRIMARY, committed=[here, elsewhere]))
    before[3, 2] = WORKERS[1]
    assert np.array_equal(planner.owners_BG, before)


def check_link(
    random_step: RandomStep,
    span: tuple[int, int],
    worker: int,
    route: Route | None,
    lanes: list[tuple[int, int, int]],
    prompts: list[tuple[int, int, int]],
) -> None:
    """The route on the primary, and the worker's reading of the same message. Both lists: (lane, qkv, position)."""
    assert (route is None) == (not lanes and not prompts)
    if route is not None:
        assert route.decode_qkv_U.tolist() == [qkv for _, qkv, _ in lanes]
        assert route.prefill_qkv_A.tolist() == [qkv for _, qkv, _ in prompts]
    planner, step = make_planner(worker), random_step.seen_by(worker)
    planner.apply(step)
    found = planner.worker_input(step, span)
    assert found.lanes.lane_U.tolist() == [lane for lane, _, _ in lanes]
    assert found.lanes.qkv_U.tolist() == found.append.qkv_A.tolist() == list(range(len(lanes)))
    assert found.lanes.length_U.tolist() == [position + 1 for _, _, position in lanes]
    assert found.append.cell_A.tolist() == [random_step.cell_of(worker, lane, position) for lane, _, position in lanes]
    expected = [random_step.cell_of(worker, lane, position) for lane, _, position in prompts]
    assert found.prefill_append.cell_A.tolist() == expected
    assert found.prefill_append.qkv_A.tolist() == list(range(len(prompts)))
