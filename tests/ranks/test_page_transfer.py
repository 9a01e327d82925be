"""Both ends of every link agree about what travels, and pages end where they belong."""

from random import Random

import numpy as np
import pytest
import torch

from hetis.core.messages.step_command import PageEntries, PageTransfer, Transfers
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
        num_lanes=SLOTS * GROUPS,
        max_model_len=8 * PAGE_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.pages_L2PSD.copy_(torch.randn(pool.pages_L2PSD.shape, generator=torch.Generator().manual_seed(rank)))
    lanes, indices = np.divmod(np.arange(PAGES, dtype=np.int32), 8)
    pool.apply(PageEntries(lanes, indices, np.array(random.sample(range(PAGES), PAGES), dtype=np.int32)))
    return pool


def random_transfers(random: Random) -> list[PageTransfer]:
    """A lane takes part once at most, as in a real step."""
    transfers = []
    for lane in random.sample(range(SLOTS * GROUPS), random.randint(0, 15)):
        home = 0 if lane % GROUPS < 3 else 1
        source, target = random.sample([home, *WORKERS], 2)
        first = random.randint(0, 7)
        transfers.append(PageTransfer(0, lane, source, target, first, random.randint(first + 1, 8)))
    return [*transfers, PageTransfer(1, 0, 0, 2, 0, 1)]  # one of another stage


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
    transfers = random_transfers(random)
    for home, groups in HOMES.items():
        mine = hauls_of(Transfers.of(transfers), 0, groups, GROUPS)
        ends = primary_hauls(mine, pools[home], WORKERS)
        for layer in range(LAYERS):
            for worker in ends:
                carry(worker_haul(mine, pools[worker], home), ends[worker], layer)
            for worker in ends:
                carry(ends[worker], worker_haul(mine, pools[worker], home), layer)
    for transfer in transfers[:-1]:
        source, target = (
            pools[rank].table_host_BW[transfer.lane, transfer.first : transfer.stop]
            for rank in (transfer.source, transfer.target)
        )
        expected = before[transfer.source][:, :, source]
        assert torch.equal(pools[transfer.target].pages_L2PSD[:, :, target], expected)
        before[transfer.target][:, :, target] = expected
    assert all(torch.equal(pool.pages_L2PSD, before[rank]) for rank, pool in pools.items()), "other pages were touched"
