"""Groups of every primary of a plan: stages of any size; workers belong to none."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch

from hetis.comm.collectives import GroupTensorParallel, SingleRank
from hetis.comm.groups import Groups, init_groups
from hetis.comm.rendezvous import LocalRendezvous
from hetis.core.plan import AttentionWorker, Plan
from tests.comm.comm_helpers import CPU, Ranks, device_info, together
from tests.comm.rank_script import plan_of_stages
from tests.processes.look import DEADLINE

H = 40


def join_all(plan: Plan, hosts: Callable[[int], str] = lambda _: "here") -> list[Groups]:
    """Groups of all primaries, joined by threads of this process; `hosts`: host name of a rank."""
    rendezvous = LocalRendezvous()
    count = len(plan.primaries)
    fleet = [device_info(rank, host=hosts(rank)) for rank in range(plan.world_size)]

    def join(rank: int) -> Groups:
        return init_groups(
            plan,
            fleet,
            rank,
            rendezvous,
            CPU,
            max_tokens=17,
            hidden_size=H,
            dtype=torch.float16,
            timeout=timedelta(seconds=DEADLINE),
        )

    return together(*[partial(join, rank) for rank in range(count)])


@pytest.mark.parametrize("sizes", [[1], [3], [1, 1], [2, 1], [1, 3], [3, 2], [2, 3, 1, 2]])
def test_hidden_states_pass_through_all_stages(sizes: list[int]) -> None:
    plan = plan_of_stages(sizes)
    groups = join_all(plan)
    batches = [torch.randn(n, H, generator=torch.Generator().manual_seed(n)).half() for n in (1, 17, 0, 4)]

    def run(rank: int) -> None:
        stage, _ = plan.position_of(rank)
        for batch in batches:
            hidden_TH = batch.clone() if stage == 0 else groups[rank].pipeline.recv(len(batch))
            assert torch.equal(hidden_TH, batch)
            hidden_TH.neg_().neg_()  # in place: the receiver owns it
            if stage < len(sizes) - 1:
                groups[rank].pipeline.send(hidden_TH)

    together(*[partial(run, rank) for rank in range(sum(sizes))])
    for group in groups:
        group.close()


def test_every_rank_of_a_later_stage_has_one_sender() -> None:
    assert plan_of_stages([2, 3, 1]).handovers == ((0, 2), (1, 3), (0, 4), (2, 5))


def test_a_single_primary_has_no_peers() -> None:
    plan = Plan(stages=plan_of_stages([1]).stages, workers=(AttentionWorker(rank=1, device="cpu"),))
    (groups,) = join_all(plan)
    assert isinstance(groups.tensor_parallel, SingleRank)
    ones_11 = torch.ones(1, 1)
    groups.tensor_parallel.all_reduce(ones_11)
    assert groups.tensor_parallel.gather_columns(ones_11, [1]) is ones_11
    assert float(ones_11) == 1


def test_ranks_connect_their_group_when_they_join_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's communicator exists before the fleet is ready."""
    connected: list[int] = []
    connect = GroupTensorParallel.connect

    def recorded(group: GroupTensorParallel, device: torch.device) -> None:
        connect(group, device)
        connected.append(group.index)

    monkeypatch.setattr(GroupTensorParallel, "connect", recorded)
    for group in join_all(plan_of_stages([3]), hosts=str):
        group.close()
    assert sorted(connected) == [0, 1, 2]


def test_a_missing_member_is_named() -> None:
    plan = plan_of_stages([2])
    with pytest.raises(TimeoutError, match="stage/0/pid/1"):
        init_groups(
            plan,
            [device_info(0), device_info(1)],
            0,
            LocalRendezvous(),
            CPU,
            max_tokens=1,
            hidden_size=H,
            dtype=torch.float32,
            timeout=timedelta(seconds=0.05),
        )


def test_stages_of_two_and_one_in_processes() -> None:
    with Ranks("stages", [0, 1, 2]) as ranks:
        assert all(text.endswith("ok\n") for text in ranks.finish().values())
