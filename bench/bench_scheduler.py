"""Host time of one decode step: `schedule()`, page deltas and `on_tokens()`, with running decodes only.

    python bench/bench_scheduler.py [--groups 8] [--workers 2] [--page-size 32]

Claim: under 300 us on average at 64 sequences of 8 head groups, so that the driver does not delay the fleet. All
sequences have the same length, so that every lane of every sequence needs a new page in the same step: the worst case.
"""

import argparse
import time
from statistics import median

from hetis.cache.cache_manager import CacheManager
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams
from hetis.dispatcher.simple_dispatchers import ProportionalDispatcher
from hetis.scheduler.scheduler import Scheduler

PROMPT_LEN = 64


def one_primary(num_groups: int, num_workers: int) -> Plan:
    primary = Primary(rank=0, device="cpu", groups=(0, num_groups), mlp_columns=(0, 1), vocab_rows=(0, 1))
    workers = tuple(AttentionWorker(rank=1 + index, device="cpu") for index in range(num_workers))
    return Plan(stages=(Stage(layers=(0, 1), primaries=(primary,)),), workers=workers)


def running_decodes(num_sequences: int, plan: Plan, num_groups: int, page_size: int) -> tuple[Scheduler, CacheManager]:
    """A scheduler whose sequences have all finished their prompts and have the same length."""
    num_pages = dict.fromkeys(plan.ranks, num_sequences * num_groups * 64)
    cache = CacheManager(plan, num_groups, num_pages, page_size, num_sequences)
    scheduler = Scheduler(
        cache,
        ProportionalDispatcher(),
        max_num_seqs=num_sequences,
        max_num_batched_tokens=num_sequences * PROMPT_LEN,
        max_model_len=64 * page_size,
    )
    for arrival in range(num_sequences):
        sequence = Sequence(
            id=str(arrival),
            token_ids=list(range(PROMPT_LEN)),
            prompt_len=PROMPT_LEN,
            params=SamplingParams(),
            max_tokens=1 << 20,
            seed=0,
            stop_ids=frozenset({2}),
            arrival=arrival,
        )
        scheduler.add(sequence)
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.on_tokens(batch, [7] * num_sequences)
    return scheduler, cache


def measure(num_sequences: int, num_groups: int, num_workers: int, page_size: int, num_steps: int) -> None:
    scheduler, cache = running_decodes(num_sequences, one_primary(num_groups, num_workers), num_groups, page_size)
    tokens = [7] * num_sequences
    plain_us: list[float] = []
    cross_us: list[float] = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        batch = scheduler.schedule()
        deltas = cache.take_deltas()
        assert batch is not None
        scheduler.on_tokens(batch, tokens)
        (cross_us if deltas else plain_us).append((time.perf_counter() - begin) * 1e6)
    mean_us = (sum(plain_us) + sum(cross_us)) / num_steps
    print(
        f"{num_sequences:4} sequences x {num_groups} groups: {median(plain_us):7.0f} us per step without new pages, "
        f"{median(cross_us):7.0f} us when all lanes cross, {mean_us:7.0f} us on average"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=8, help="head groups (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="attention workers (default 2)")
    parser.add_argument("--page-size", type=int, default=32, help="tokens per page (default 32)")
    parser.add_argument("--steps", type=int, default=1000, help="steps to measure (default 1000)")
    arguments = parser.parse_args()
    for num_sequences in (64, 256):
        measure(num_sequences, arguments.groups, arguments.workers, arguments.page_size, arguments.steps)


if __name__ == "__main__":
    main()
