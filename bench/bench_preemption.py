"""Steps that random loads take on fleets short of pages, and how long earlier sequences wait for later ones.

    python bench/bench_preemption.py [--loads 40]

No model runs, only the scheduler, a policy and the page tables, in lockstep: every step one micro-batch enters the
pipeline, and it returns after as many steps as there are stages. All figures are exact, so two versions of the
scheduler can be compared. A wait is the number of tokens that later arrivals get between two tokens of an earlier one.
"""

import argparse
from collections import deque
from random import Random
from typing import NamedTuple

from hetis.cache.cache_manager import CacheManager
from hetis.core.batch import Batch
from hetis.core.placement import Dispatcher
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams
from hetis.cost.memory import largest_context
from hetis.dispatcher.simple_dispatchers import EvenDispatcher, PrimaryOnlyDispatcher, ProportionalDispatcher
from hetis.scheduler.scheduler import Scheduler

GROUPS, PAGE_SIZE = 8, 16
POLICIES: dict[str, type[Dispatcher]] = {
    "primary-only": PrimaryOnlyDispatcher,
    "even": EvenDispatcher,
    "proportional": ProportionalDispatcher,
}


class Figures(NamedTuple):
    """Counts of one load, or sums over several."""

    num_steps: int
    num_tokens: int  # computed, recomputed ones included
    num_preemptions: int
    longest_wait: int


def make_plan(num_stages: int, num_workers: int) -> Plan:
    stages = tuple(
        Stage(
            layers=(index, index + 1),
            primaries=(Primary(rank=index, device="cpu", groups=(0, GROUPS), mlp_columns=(0, 1), vocab_rows=(0, 1)),),
        )
        for index in range(num_stages)
    )
    workers = tuple(AttentionWorker(rank=num_stages + index, device="cpu") for index in range(num_workers))
    return Plan(stages=stages, workers=workers)


def make_sequence(arrival: int, random: Random) -> Sequence:
    prompt_len = random.randint(8, 200)
    return Sequence(
        id=str(arrival),
        token_ids=[1] * prompt_len,
        prompt_len=prompt_len,
        params=SamplingParams(),
        max_tokens=random.randint(8, 300),
        seed=0,
        stop_ids=frozenset(),
        arrival=arrival,
    )


class Load:
    """Sixty requests on one fleet."""

    def __init__(self, policy: str, num_stages: int, num_workers: int, seed: int) -> None:
        self._random = random = Random(f"{num_stages} {num_workers} {seed}")
        plan = make_plan(num_stages, num_workers)
        context = random.choice((512, 640))
        num_pages = {rank: GROUPS * context // PAGE_SIZE * random.randint(1, 3) for rank in range(num_stages)}
        num_pages |= {rank: GROUPS * random.choice((8, 30, 80)) for rank in plan.worker_ranks}
        self._num_stages = num_stages
        self._scheduler = Scheduler(
            CacheManager(plan, GROUPS, num_pages, PAGE_SIZE, 32),
            POLICIES[policy](),
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=min(context, largest_context(plan, num_pages, PAGE_SIZE)),
            num_stages=num_stages,
        )
        self._coming = [make_sequence(arrival, random) for arrival in range(60)]
        self._waits: dict[int, int] = {}  # arrival of an unfinished sequence -> tokens of later ones since its last
        self._longest_wait = 0

    def run(self) -> Figures:
        pipeline: deque[Batch | None] = deque()
        num_steps = num_tokens = 0
        while self._coming or self._scheduler.has_work:
            if self._coming and self._random.random() < 0.2:
                self._scheduler.add(self._coming.pop(0))
            if len(pipeline) == self._num_stages and (done := pipeline.popleft()) is not None:
                self._finish(done)
            batch = self._scheduler.schedule()
            pipeline.append(batch)
            num_steps += 1
            num_tokens += batch.num_tokens if batch else 0
        return Figures(num_steps, num_tokens, self._scheduler.num_preemptions, self._longest_wait)

    def _finish(self, batch: Batch) -> None:
        for new in self._scheduler.on_tokens(batch, [1] * sum(row.samples for row in batch.rows)):
            assert new is not None, "nothing is aborted"
            arrival = new.sequence.arrival
            self._waits[arrival] = 0
            for other in self._waits:
                if other < arrival:
                    self._waits[other] += 1
                    self._longest_wait = max(self._longest_wait, self._waits[other])
            if new.sequence.finish_reason is not None:
                del self._waits[arrival]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=40, help="random loads of each kind (default 40)")
    arguments = parser.parse_args()
    print(f"{'policy':14} stages workers {'steps':>8} {'tokens':>9} preemptions  longest wait")
    for policy in POLICIES:
        for num_stages in (1, 2, 3):
            for num_workers in (0, 2):
                found = [Load(policy, num_stages, num_workers, seed).run() for seed in range(arguments.loads)]
                steps, tokens, preemptions = (sum(column) for column in list(zip(*found, strict=True))[:3])
                wait = max(one.longest_wait for one in found)
                print(
                    f"{policy:14} {num_stages:6} {num_workers:7} {steps:8} {tokens:9} {preemptions:11} {wait:13}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
