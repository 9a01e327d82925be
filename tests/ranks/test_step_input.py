"""The index tensors of a step against plain loops over rows, tokens and head groups; both ends of a link agree."""

import random

import msgspec
import numpy as np
import pytest
import torch

from hetis.core.messages import NewSequence, PageDelta, StepCommand
from hetis.core.placement import PoolId
from hetis.core.sampling_params import SamplingParams
from hetis.ranks.pool import PagePool
from hetis.ranks.step_input import StepPlanner

CPU = torch.device("cpu")
GROUPS, SLOTS, PAGE_SIZE = 5, 6, 4
WINDOWS = 0, 9  # of two layers
PRIMARY, WORKERS = 0, [2, 3]


def int32(values: list[int]) -> bytes:
    return np.asarray(values, dtype=np.int32).tobytes()


def make_planner(rank: int) -> StepPlanner:
    pool = PagePool(
        PoolId(rank, 0),
        num_layers=len(WINDOWS),
        num_pages=480,
        page_size=PAGE_SIZE,
        head_dim=8,
        num_rows=SLOTS * GROUPS,
        max_model_len=64,
        dtype=torch.float32,
        device=CPU,
    )
    return StepPlanner(pool, GROUPS, SLOTS, WINDOWS, CPU)


class Step:
    """A random step: who owns what, which page of whom is where, and the rows."""

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
        self.pages = {
            rank: {(lane, w): page for (lane, w), page in zip(cells(), draw.sample(range(480), 480), strict=True)}
            for rank in (PRIMARY, *WORKERS)
        }

    def command(self) -> StepCommand:
        deltas = [
            PageDelta(rank=rank, stage=0, entries=int32([v for (lane, w), page in t.items() for v in (lane, w, page)]))
            for rank, t in self.pages.items()
        ]
        new = [
            NewSequence(slot=s, owners=int32(o), prompt_len=1, seed=0, params=SamplingParams())
            for s, o in self.owners.items()
        ]
        slots, starts, counts = (int32([row[i] for row in self.rows]) for i in range(3))
        return StepCommand(
            step=0,
            landed=b"",
            released=[],
            admitted=new,
            pages=[*deltas, PageDelta(rank=PRIMARY, stage=1, entries=int32([0, 0, 479]))],  # another stage's: not ours
            slots=slots,
            starts=starts,
            counts=counts,
            num_decode=len(self.decode),
            tokens=int32(list(range(sum(row[2] for row in self.rows)))),
            sampled=b"",
            hauls=b"",
        )

    def slot_of(self, rank: int, lane: int, position: int) -> int:
        return self.pages[rank][lane, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE


def cells() -> list[tuple[int, int]]:
    return [(lane, w) for lane in range(SLOTS * GROUPS) for w in range(16)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("span", [(0, 0), (3, 3), (GROUPS, GROUPS)])
def test_without_head_groups_there_are_tokens_alone(seed: int, span: tuple[int, int]):
    command, primary = Step(seed).command(), make_planner(PRIMARY)
    primary.apply(command)
    found = primary.primary_input(command, span, WORKERS)
    assert found.token_T.tolist() == list(range(found.num_tokens))
    assert len(found.position_T) == found.num_tokens > 0
    assert (len(found.append), len(found.local), found.prefill, found.routes) == (0, 0, None, [])


@pytest.mark.parametrize("span", [(0, GROUPS), (2, 5), (1, 2)])
@pytest.mark.parametrize("seed", range(8))
def test_against_loops(seed: int, span: tuple[int, int]):
    step, command = Step(seed), Step(seed).command()
    first, width = span[0], span[1] - span[0]
    primary = make_planner(PRIMARY)
    primary.apply(command)
    found = primary.primary_input(command, span, WORKERS)

    local, appended, remote = [], [], {w: [] for w in WORKERS}
    decoded = [(slot, start + i) for slot, start, count in step.decode for i in range(count)]
    for token, (slot, position) in enumerate(decoded):
        for group in range(*span):
            lane, row = slot * GROUPS + group, token * width + group - first
            if step.owners[slot][group] == PRIMARY:
                local.append((lane, row, position + 1))
                appended.append((row, step.slot_of(PRIMARY, lane, position)))
            else:
                remote[step.owners[slot][group]].append((lane, row, position))
    prompts, token = {w: [] for w in WORKERS}, len(decoded)
    for slot, start, count in step.prefill:
        for position in range(start, start + count):
            for group in range(*span):
                lane, row = slot * GROUPS + group, token * width + group - first
                appended.append((row, step.slot_of(PRIMARY, lane, position)))
                if step.owners[slot][group] != PRIMARY:
                    prompts[step.owners[slot][group]].append((lane, row, position))
            token += 1

    assert (
        list(zip(found.local.lane_U.tolist(), found.local.row_U.tolist(), found.local.length_U.tolist(), strict=True))
        == local
    )
    lengths = [length for *_, length in local]
    assert found.local.kv_tokens == (sum(lengths) + sum(min(length, WINDOWS[1]) for length in lengths)) / 2
    assert list(zip(found.append.row_A.tolist(), found.append.slot_A.tolist(), strict=True)) == appended
    assert (found.num_tokens, found.num_decode) == (token, len(decoded))
    assert found.position_T.tolist() == [s + i for _, s, count in step.rows for i in range(count)]
    if step.prefill:
        assert found.prefill.context_C.tolist() == [start + count for _, start, count in step.prefill]
        assert found.prefill.lane_CG.tolist() == [[s * GROUPS + g for g in range(*span)] for s, _, _ in step.prefill]
    else:
        assert found.prefill is None
    routes = {route.peer: route for route in found.routes}
    for worker in WORKERS:
        check_link(step, command, span, worker, routes.get(worker), remote[worker], prompts[worker])


def test_a_lane_that_has_landed_lives_there() -> None:
    planner, command = make_planner(PRIMARY), Step(0).command()
    planner.apply(command)
    before = planner.owners_BG.copy()
    landed = int32([3, 0, 2, WORKERS[1], 3, 1, 4, 9])  # the second one of another stage
    planner.apply(msgspec.structs.replace(command, landed=landed, admitted=[]))
    before[3, 2] = WORKERS[1]
    assert np.array_equal(planner.owners_BG, before)


def check_link(step, command, span, worker, route, lanes, prompts):
    """The route on the primary, and the worker's reading of the same message."""
    assert (route is None) == (not lanes and not prompts)
    if route is not None:
        assert route.decode_row_U.tolist() == [row for _, row, _ in lanes]
        assert route.prefill_row_A.tolist() == [row for _, row, _ in prompts]
    planner = make_planner(worker)
    planner.apply(command)
    found = planner.worker_input(command, PRIMARY, span)
    assert found.lanes.lane_U.tolist() == [lane for lane, _, _ in lanes]
    assert found.lanes.row_U.tolist() == list(range(len(lanes)))
    assert found.lanes.length_U.tolist() == [position + 1 for _, _, position in lanes]
    assert found.append.slot_A.tolist() == [step.slot_of(worker, lane, position) for lane, _, position in lanes]
    expected = [step.slot_of(worker, lane, position) for lane, _, position in prompts]
    assert found.prefill_append.slot_A.tolist() == expected
