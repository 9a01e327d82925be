"""Requests over time: Poisson arrivals, lengths as in a chat service. One seed, one workload."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from random import Random

import msgspec

FIRST_TOKEN_ID = 5  # below are tokens that models give a meaning


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts: log-normal, divided by `scale`, within limits."""

    log_mean: float
    log_std: float
    scale: float = 1.0
    smallest: int = 1
    largest: int  # after scaling

    def fit(self, tokens: float) -> int:
        return max(self.smallest, min(self.largest, round(tokens / self.scale)))

    def draw(self, rng: Random) -> int:
        return self.fit(math.exp(rng.gauss(self.log_mean, self.log_std)))


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    num_requests: int
    rate_per_s: float
    context: Lengths
    generated: Lengths
    seed: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    arrival_s: float
    token_ids: list[int]
    num_generated: int


def make_requests(workload: Workload, vocab_size: int, trace: Iterable[tuple[int, int]] | None = None) -> list[Request]:
    """In order of arrival. `trace`: (context, generated) tokens to take instead of drawn lengths."""
    rng, requests, now = Random(workload.seed), [], 0.0
    given = iter(trace) if trace is not None else None
    for _ in range(workload.num_requests):
        now += rng.expovariate(workload.rate_per_s)
        if given is None:
            context, generated = workload.context.draw(rng), workload.generated.draw(rng)
        else:
            row = next(given, None)
            if row is None:
                raise ValueError(f"the trace has fewer than {workload.num_requests} rows: ask for fewer requests.")
            context, generated = workload.context.fit(row[0]), workload.generated.fit(row[1])
        ids = [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(context)]
        requests.append(Request(arrival_s=now, token_ids=ids, num_generated=generated))
    return requests


def read_trace(path: Path) -> list[tuple[int, int]]:
    """(context, generated) tokens of an Azure trace: CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        try:
            return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no trace: line {rows.line_num} has {error}.") from error
