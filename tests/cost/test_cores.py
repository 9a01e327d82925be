"""Which ranks are said to compete for cores, in what words; and that the ledger names the cores of each rank."""

import pytest

from hetis.core.device_info import DeviceInfo
from hetis.core.plan_sources import split_evenly
from hetis.core.sizes import ranges
from hetis.cost.cores import cores_of, crowded_cores, threads_of
from tests.core.test_plan import SPEC
from tests.cost.test_memory import ledger_of


def info_of(
    rank: int,
    threads: int,
    cores: range,
    usable: float | None = None,
    host: str = "here",
    device: str = "cpu",
) -> DeviceInfo:
    return DeviceInfo(
        rank=rank, device=device, name="EPYC", host=host, address="", pid=rank, num_threads=threads,
        cores=tuple(cores), usable_cores=len(cores) if usable is None else usable,
        total_memory=2**32, free_memory=2**32, gpu=f"GPU {rank}" if device != "cpu" else "",
    )  # fmt: skip


def sentences(plan: str, *fleet: DeviceInfo) -> list[str]:
    return crowded_cores(split_evenly(plan, SPEC, "cpu"), fleet)


def test_a_worker_beside_a_primary_takes_half_its_threads() -> None:
    assert sentences("1+1", info_of(0, 1, range(2)), info_of(1, 1, range(2))) == [
        "ranks 0-1 compete for 2 cores of one host (0-1): primary 0 computes with 1 thread instead of 2; "
        "leave rank 1 out of the plan, or give it a host or GPU of its own"
    ]


def test_more_threads_than_cores_take_turns() -> None:
    assert sentences("1+2", *(info_of(rank, 1, range(2)) for rank in range(3))) == [
        "ranks 0-2 compete for 2 cores of one host (0-1): primary 0 computes with 1 thread instead of 2 and "
        "3 threads take turns; leave ranks 1-2 out of the plan, or give each a host or GPU of its own"
    ]
    assert sentences("1+1", info_of(0, 1, range(1)), info_of(1, 1, range(1))) == [
        "ranks 0-1 compete for 1 core of one host (0): 2 threads take turns; "
        "leave rank 1 out of the plan, or give it a host or GPU of its own"
    ]


def test_primaries_that_share_cores_are_all_named() -> None:
    assert sentences("2+0", info_of(0, 4, range(8)), info_of(1, 4, range(8))) == [
        "ranks 0-1 compete for 8 cores of one host (0-7): primary 0 computes with 4 threads instead of 8, "
        "primary 1 computes with 4 threads instead of 8; use one primary here, or give the others hosts or GPUs of "
        "their own"
    ]


def test_the_quota_of_control_groups_counts() -> None:
    infos = [info_of(rank, 1, range(8), usable=2.5) for rank in range(2)]
    assert cores_of(infos[0]) == "0-7 (at most 2.5)"
    [sentence] = sentences("1+1", *infos)
    assert "compete for 8 cores of one host (0-7, of which 2.5 may be used)" in sentence
    assert "primary 0 computes with 1 thread instead of 2" in sentence


def test_affinity_masks_count() -> None:
    apart = [info_of(0, 2, range(0, 4)), info_of(1, 2, range(4, 8))]
    assert sentences("1+1", *apart) == []
    chained = [*apart, info_of(2, 2, range(3, 5))]
    [sentence] = sentences("1+2", *chained)
    assert sentence.startswith("ranks 0-2 compete for 8 cores of one host (0-7): ")


@pytest.mark.parametrize(
    "second",
    [info_of(1, 1, range(2), host="there"), info_of(1, 1, range(2), device="cuda:0")],
    ids=["another host", "a GPU"],
)
def test_other_hosts_and_gpus_do_not_compete(second: DeviceInfo) -> None:
    assert sentences("1+1", info_of(0, 2, range(2)), second) == []


def test_workers_alone_on_a_host_are_told_apart_from_the_primary() -> None:
    fleet = [info_of(0, 2, range(2)), *(info_of(rank, 1, range(2), host="there") for rank in (1, 2))]
    assert sentences("1+2", *fleet) == [
        "ranks 1-2 compete for 2 cores of one host (0-1): attention worker 1 computes with 1 thread instead of 2, "
        "attention worker 2 computes with 1 thread instead of 2; use one attention worker here, or give the others "
        "hosts or GPUs of their own"
    ]


def test_the_ledger_names_threads_and_cores_of_ranks_on_cpus() -> None:
    plan = split_evenly("1+1", SPEC, "cpu", "1MiB")
    ledger = ledger_of(plan, [info_of(0, 1, range(2)), info_of(1, 1, range(2), device="cuda:0")])
    primary, worker = (line.split() for line in str(ledger).splitlines()[1:3])
    assert primary[:5] == ["0", "primary", "cpu", "1", "0-1"]
    assert worker[:6] == ["1", "attention", "worker", "cuda:0", "-", "-"]


def test_cores_are_listed_in_runs() -> None:
    assert ranges([8, 0, 1, 3, 2, 10, 11]) == "0-3,8,10-11"
    assert ranges([]) == ""
    assert threads_of(info_of(0, 1, range(3, 4))) == "1 thread on core 3"
