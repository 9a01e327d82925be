"""Requests over time: Poisson arrivals, lengths as in a chat service; determined by the seed."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

FIRST_TOKEN_ID = 5  # lower ids are special tokens


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Distribution of token counts: log-normal, divided by `scale`, clamped to limits."""

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


def make_requests(workload: Workload, vocab_size: int, trace: Sequence[tuple[int, int]] = ()) -> list[Request]:
    """Requests in order of arrival. `trace`: (context, generated) tokens to sample instead of the distributions."""
    rng, requests, now = Random(workload.seed), [], 0.0
    for _ in range(workload.num_requests):
        now += rng.expovariate(workload.rate_per_s)
        if trace:
            row = rng.choice(trace)
            context, generated = workload.context.fit(row[0]), workload.generated.fit(row[1])
        else:
            context, generated = workload.context.draw(rng), workload.generated.draw(rng)
        ids = [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(context)]
        requests.append(Request(arrival_s=now, token_ids=ids, num_generated=generated))
    return requests


def read_trace(path: Path) -> list[tuple[int, int]]:
    """(context, generated) tokens of an Azure trace: CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens.

    ValueError for a file that is none, or has no requests.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        try:
            found = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no trace: line {rows.line_num} has {error}.") from error
    if not found:
        raise ValueError(f"{path} is no trace: it has no requests.")
    return found
