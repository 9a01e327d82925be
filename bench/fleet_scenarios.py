"""The scenarios of `bench_fleet.py`, as data: fleets, policies, load, and requirements.

Model and fleets are sized together (a core of the machine used reads weights at 17 GB/s, the cache at 11 GB/s and
computes 70 GFLOP/s; the primary's memory runs at a quarter of that, `emulation/device.py`):

    weights of a step       29 M in float32, 118 MB at 4.2 GB/s: D = 28 ms, for 1 to some 20 sequences
    the rest of a step      driver, sampling, launching: F = 8 ms without workers
    attention               16 KiB of cache a token, 195 tokens a sequence: 3.2 MB at 2.8 GB/s: a = 1.1 ms a sequence
    prompts                 0.3 ms a token (dense work at 70 GFLOP/s), 122 tokens for 63 of output: p = 0.6 ms

With R sequences at a time and an attention makespan of t times what the primary alone would take, an output token takes
(F + D) / R + t a + p. With KV memory for 32 sequences in all, 8 of them at home, and workers of 0.6 and 0.2 of the
primary's speed:

    primary-only    R = 8,  t = 1                                           6.2 ms
    hetis           R = 32, t = 0.75 / (0.6 + 0.2) = 0.94, home full        2.8 ms     2.2 x
    even            R = 24 (a home holds 1/3 of each), t = 1/3 / 0.2 = 1.7  3.9 ms     1.4 x
    proportional    R = 32, t = 0.55 / 0.2 = 2.7                            4.7 ms     1.7 x

Measured gains are smaller: homes also need room for prompts, and lanes and sequences are not divisible.
"""

from typing import Literal

import msgspec
from emulation.client import Throttle
from emulation.fleet import Fleet, Link, Member
from emulation.model import ModelShape
from emulation.workload import Lengths, Workload

Dispatch = Literal["hetis", "proportional", "even", "primary-only"]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One fleet under one policy."""

    label: str
    fleet: Fleet
    dispatch: Dispatch
    throttles: tuple[Throttle, ...] = ()


class Requirement(msgspec.Struct, frozen=True, kw_only=True):
    """`metric` of case `of` over that of case `over`: at least, or at most, `bound`."""

    metric: str
    of: str
    over: str
    bound: float
    at_least: bool = True

    def holds(self, ratio: float) -> bool:
        return ratio >= self.bound if self.at_least else ratio <= self.bound


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelShape
    max_num_seqs: int
    workload: Workload
    cases: tuple[Case, ...]  # ratios are to the first
    requirements: tuple[Requirement, ...]
    window_s: tuple[float, float] = (0.0, 0.0)  # begin and end of what `window_tokens_per_s` covers


MODEL = ModelShape(
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_head_groups=8,
    queries_per_group=2,
    head_dim=64,
    vocab_size=32_000,
)
# Log-normal fits to the Azure LLM inference trace of 2023, conversations (mean 1,155 in, 211 out). Prompts are divided
# by 8 and outputs by 3, because the emulated ridge is at 20 rows per weight read instead of an A100's 150; the longest
# are cut, so that a prompt takes at most a fifth of a small home.
CONTEXT = Lengths(log_mean=6.633, log_std=0.985, scale=8, smallest=8, largest=330)
GENERATED = Lengths(log_mean=5.019, log_std=0.859, scale=3, smallest=4, largest=170)
LOAD = 6240  # tokens of 32 sequences in the middle of their outputs

POLICIES: tuple[Dispatch, ...] = ("hetis", "proportional", "even", "primary-only")
PRIMARY = 0.25  # share of its core: see emulation/device.py


def member(speed: float, kv_tokens: int, link: Link = Link()) -> Member:  # noqa: B008 (frozen)
    """`speed`: as a multiple of the primary's."""
    return Member(share=PRIMARY * speed, kv_tokens=kv_tokens, link=link)


SMALL_HOME = Fleet(primary=member(1, LOAD // 4), workers=(member(0.2, 8000), member(0.6, 5000)))
LARGE_HOME = Fleet(primary=member(1, LOAD))
SLOW_WORKER = Fleet(primary=member(1, LOAD), workers=(member(1 / 20, LOAD),))
SLOW_LINK = Fleet(primary=member(1, LOAD), workers=(member(1, LOAD, Link(latency_ms=20.0)),))
GOOD_WORKER = Fleet(primary=member(1, LOAD), workers=(member(0.6, LOAD),))
THROTTLED_WORKER = Fleet(primary=member(1, LOAD), workers=(member(0.2, LOAD),))
THROTTLE = Throttle(at_s=12.0, rank=1, share=THROTTLED_WORKER.workers[0].share)


def workload(num_requests: int) -> Workload:
    """A load that saturates every fleet of these scenarios."""
    return Workload(num_requests=num_requests, rate_per_s=12.0, context=CONTEXT, generated=GENERATED)


def joined_by(fleet: Fleet) -> Scenario:
    """`LARGE_HOME` alone and as part of `fleet`, whose worker must not lower the throughput."""
    return Scenario(
        model=MODEL,
        max_num_seqs=32,
        workload=workload(60),
        cases=(
            Case(label="with it", fleet=fleet, dispatch="hetis"),
            Case(label="without it", fleet=LARGE_HOME, dispatch="hetis"),
        ),
        requirements=(Requirement(metric="tokens_per_s", of="with it", over="without it", bound=0.97),),
    )


SCENARIOS = {
    "small-primary": Scenario(
        model=MODEL,
        max_num_seqs=32,
        workload=workload(80),
        cases=tuple(Case(label=policy, fleet=SMALL_HOME, dispatch=policy) for policy in POLICIES),
        requirements=(
            Requirement(metric="tokens_per_s", of="hetis", over="primary-only", bound=1.3),
            Requirement(metric="tokens_per_s", of="hetis", over="even", bound=1.15),
            Requirement(metric="tokens_per_s", of="hetis", over="proportional", bound=1.0),
            Requirement(metric="tpot_p95", of="hetis", over="proportional", bound=1.0, at_least=False),
        ),
    ),
    "slow-worker": joined_by(SLOW_WORKER),
    "slow-link": joined_by(SLOW_LINK),
    "throttled": Scenario(
        model=MODEL,
        max_num_seqs=32,
        workload=workload(150),  # enough that requests still wait when the window ends
        cases=(
            Case(label="throttled", fleet=GOOD_WORKER, dispatch="hetis", throttles=(THROTTLE,)),
            Case(label="fresh start", fleet=THROTTLED_WORKER, dispatch="hetis"),
        ),
        requirements=(Requirement(metric="window_tokens_per_s", of="throttled", over="fresh start", bound=0.9),),
        window_s=(THROTTLE.at_s + 5.0, THROTTLE.at_s + 15.0),
    ),
}
