"""The lines about a start in the log: few, and without settings that are the default."""

from hetis.core.config import EngineConfig
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Setup
from hetis.driver.start_report import start_lines
from hetis.engine.setup import make_setup
from hetis.launch.checks import plan_for

GIBI = 1 << 30


def setup_of(config: EngineConfig, devices: list[tuple[str, str, int]]) -> Setup:
    """The setup on devices of (kind, name, threads), each on a host of its own."""
    _, spec, plan = plan_for(config)
    fleet = [
        DeviceInfo(
            rank=rank, device=device, name=name, host=f"host {rank}", address="", pid=rank, num_threads=threads,
            cores=tuple(range(8)), usable_cores=8.0, total_memory=8 * GIBI, free_memory=8 * GIBI,
        )
        for rank, (device, name, threads) in enumerate(devices)
    ]  # fmt: skip
    setup, _ = make_setup(config, spec, plan, fleet, eos_token_ids=[])
    return setup


def test_consecutive_members_of_one_kind_share_a_line() -> None:
    config = EngineConfig(plan="2+3", kv_cache_memory={0: 32 << 20, 1: 32 << 20, 2: 1 << 20, 3: 1 << 20, 4: 2 << 20})
    devices = [("cuda:0", "H100", 4), ("cuda:1", "H100", 4), *[("cpu", "EPYC", 1)] * 3]
    lines = start_lines(config, setup_of(config, devices))
    assert lines[1:4] == [
        "ranks 0-1: primary on cuda (H100), 32.00 MiB of KV cache each",
        "ranks 2-3: attention worker on cpu (EPYC, 1 thread on cores 0-7), 1.00 MiB of KV cache each",
        "rank 4: attention worker on cpu (EPYC, 1 thread on cores 0-7), 2.00 MiB of KV cache",
    ]
    assert all("\n" not in line for line in lines)


def test_a_default_start_shows_model_capacity_and_dispatch() -> None:
    config = EngineConfig(kv_cache_memory=16 << 20)
    setup = setup_of(config, [("cpu", "EPYC", 8)])
    page_tokens = setup.num_pages[0] // setup.spec.num_head_groups * setup.block_size
    assert start_lines(config, setup) == [
        "model in the package: 4 layers, 8 query heads, 4 KV heads, bfloat16",
        "rank 0: primary on cpu (EPYC, 8 threads on cores 0-7), 16.00 MiB of KV cache",
        f"KV cache: {page_tokens} tokens in all, at most 1024 in one sequence",
        "dispatch hetis; up to 64 sequences and 2048 tokens in a step; all else by default",
    ]


def test_settings_that_are_not_the_default_are_listed() -> None:
    config = EngineConfig(kv_cache_memory=16 << 20, dispatch="even", max_num_seqs=3, seed=7, enforce_eager=True)
    last = start_lines(config, setup_of(config, [("cpu", "EPYC", 8)]))[-1]
    assert last.startswith("dispatch even; up to 3 sequences")
    assert last.endswith("not the default: max_num_seqs 3, seed 7, enforce_eager True")
