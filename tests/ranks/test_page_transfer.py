"""Both ends of every link agree about what travels, and pages end where they belong."""

from random import Random

import numpy as np
import pytest
import torch

from hetis.cache.migration import Haul, pack_hauls
from hetis.core.messages import PageDelta, StepCommand
from hetis.core.placement import PoolId
from hetis.ranks.page_transfer import LinkHaul, hauls_of, primary_hauls, worker_haul
from hetis.ranks.pool import PagePool

HOMES = {0: (0, 3), 1: (3, 5)}  # rank -> its head groups
WORKERS = [2, 3, 4]
GROUPS, SLOTS, PAGES, LAYERS, PAGE_SIZE, HEAD_DIM = 5, 4, 160, 2, 4, 8


def make_pool(rank: int, random: Random) -> PagePool:
    """Random pages, of which each lane has eight, anywhere."""
    pool = PagePool(
        PoolId(rank, 0),
        num_layers=LAYERS,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        head_dim=HEAD_DIM,
        num_rows=SLOTS * GROUPS,
        max_model_len=8 * PAGE_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.pages_L2PSD.copy_(torch.randn(pool.pages_L2PSD.shape, generator=torch.Generator().manual_seed(rank)))
    cells = [(row, index) for row in range(SLOTS * GROUPS) for index in range(8)]
    pages = random.sample(range(PAGES), PAGES)
    entries = np.array([(*cell, page) for cell, page in zip(cells, pages, strict=True)], dtype=np.int32)
    pool.apply([PageDelta(rank=rank, stage=0, entries=entries.tobytes())])
    return pool


def random_hauls(random: Random) -> list[Haul]:
    """A lane takes part once at most, as in a real step."""
    hauls = []
    for row in random.sample(range(SLOTS * GROUPS), random.randint(0, 15)):
        home = 0 if row % GROUPS < 3 else 1
        source, target = random.sample([home, *WORKERS], 2)
        first = random.randint(0, 7)
        hauls.append(Haul(0, row, source, target, first, random.randint(first + 1, 8)))
    return [*hauls, Haul(1, 0, 0, 2, 0, 1)]  # one of another stage


def command_with(hauls: list[Haul]) -> StepCommand:
    nothing = {"landed": b"", "slots": b"", "starts": b"", "counts": b"", "tokens": b"", "sampled": b""}
    return StepCommand(step=0, released=[], admitted=[], pages=[], num_decode=0, hauls=pack_hauls(hauls), **nothing)


def message(num_pages: int) -> torch.Tensor:
    return torch.full((num_pages, 1, 2, PAGE_SIZE, HEAD_DIM), torch.nan)


def carry(here: LinkHaul, there: LinkHaul, layer: int) -> None:
    """One message from one end to the other."""
    assert here.num_out == there.num_in
    pages = message(here.num_out)
    here.write(layer, pages)
    there.read(layer, pages)


@pytest.mark.parametrize("seed", range(30))
def test_pages_arrive_where_they_belong(seed: int):
    random = Random(seed)
    pools = {rank: make_pool(rank, random) for rank in [*HOMES, *WORKERS]}
    before = {rank: pool.pages_L2PSD.clone() for rank, pool in pools.items()}
    hauls = random_hauls(random)
    command = command_with(hauls)
    for home, groups in HOMES.items():
        mine = hauls_of(command, 0, groups, GROUPS)
        ends = primary_hauls(mine, pools[home], WORKERS)
        for layer in range(LAYERS):
            for worker in ends:
                carry(worker_haul(mine, pools[worker], home), ends[worker], layer)
            for worker in ends:
                carry(ends[worker], worker_haul(mine, pools[worker], home), layer)
    for haul in hauls[:-1]:
        source, target = (
            pools[rank].table_host_BW[haul.row, haul.first : haul.stop] for rank in (haul.source, haul.target)
        )
        expected = before[haul.source][:, :, source]
        assert torch.equal(pools[haul.target].pages_L2PSD[:, :, target], expected)
        before[haul.target][:, :, target] = expected
    assert all(torch.equal(pool.pages_L2PSD, before[rank]) for rank, pool in pools.items()), "other pages were touched"
