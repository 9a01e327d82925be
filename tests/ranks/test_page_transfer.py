"""Both ends of every link agree on the pages that it carries, and pages end in the cells where they belong."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
import torch

from hetis.comm.links.base import Link
from hetis.comm.links.local import local_pair
from hetis.core.batch import Batch
from hetis.core.messages.step_command import PageEntries, PageTransfer, Step, decode, encode
from hetis.core.placement import PoolId
from hetis.core.plan import Primary
from hetis.core.step_times import Activity
from hetis.ranks.page_transfer import HomeTransfers, WorkerTransfers
from hetis.ranks.pool import PagePool
from tests.ranks.unbuffered_link import unbuffered_pair

HOMES = {0: (0, 3), 1: (3, 5)}  # rank -> its head groups
WORKERS = [2, 3, 4]
GROUPS, SLOTS, PAGES, LAYERS, PAGE_SIZE, HEAD_DIM = 5, 4, 160, 2, 4, 8
MAX_BYTES = PAGES * 2 * PAGE_SIZE * HEAD_DIM * 4


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


def step_with(transfers: list[PageTransfer], rank: int) -> Step:
    return decode(encode(0, Batch(rows=[], admitted=[], released=[]), transfers=transfers), rank)


def primary(rank: int) -> Primary:
    return Primary(rank=rank, device="cpu", groups=HOMES[rank], mlp_columns=(0, 0), vocab_rows=(0, 0))


def lap(activity: Activity) -> None:
    assert activity in (Activity.WAIT, Activity.MIGRATION)


def exchange(
    transfers: list[PageTransfer], pools: dict[int, PagePool], pair: Callable[..., tuple[Link, Link]]
) -> dict[int, int]:
    """All layers of a step, each rank on a thread of its own. Pages of a layer that each rank counts."""
    ends = {(home, worker): pair(MAX_BYTES, MAX_BYTES) for home in HOMES for worker in WORKERS}
    ranks: dict[int, HomeTransfers | WorkerTransfers] = {}
    for home, groups in HOMES.items():
        links = {worker: ends[home, worker][0] for worker in WORKERS}
        ranks[home] = HomeTransfers(pools[home], links, groups, GROUPS, lap)
    for worker in WORKERS:
        homes = [(primary(home), ends[home, worker][1]) for home in HOMES]
        ranks[worker] = WorkerTransfers(pools[worker], homes, GROUPS, lap)

    def run(rank: HomeTransfers | WorkerTransfers) -> int:
        rank.begin(step_with(transfers, rank=0))
        for layer in range(LAYERS):
            rank.exchange(layer)
        return rank.num_pages

    with ThreadPoolExecutor(len(ranks)) as threads:
        return dict(zip(ranks, threads.map(run, ranks.values()), strict=True))


@pytest.mark.parametrize("pair", [local_pair, unbuffered_pair])
@pytest.mark.parametrize("seed", range(30))
def test_pages_arrive_where_they_belong(seed: int, pair: Callable[..., tuple[Link, Link]]) -> None:
    random = Random(seed)
    pools = {rank: make_pool(rank, random) for rank in [*HOMES, *WORKERS]}
    expected = {rank: pool.pages_L2PSD.clone() for rank, pool in pools.items()}
    transfers = random_transfers(random)
    counted = exchange(transfers, pools, pair)
    for transfer in transfers[:-1]:
        source, target = (
            pools[rank].table_host_BW[transfer.lane, transfer.first : transfer.stop]
            for rank in (transfer.source, transfer.target)
        )
        pages = expected[transfer.source][:, :, source]
        expected[transfer.target][:, :, target] = pages
        num_links = 1 if {transfer.source, transfer.target} & HOMES.keys() else 2
        counted[0 if transfer.lane % GROUPS < 3 else 1] -= num_links * len(source)
        for worker in {transfer.source, transfer.target} - HOMES.keys():
            counted[worker] -= len(source)
    assert all(torch.equal(pool.pages_L2PSD, expected[rank]) for rank, pool in pools.items())
    assert not any(counted.values()), "every page counts at both ends of each link that it crosses"
