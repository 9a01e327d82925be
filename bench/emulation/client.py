"""Sends a workload to a fleet at its arrival times, and records when tokens arrive."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from hetis.core.sampling_params import SamplingParams
from hetis.frontend.client import Inbox
from hetis.frontend.requests import Piece
from hetis.frontend.requests import Request as EngineRequest

from .launch import EmulatedFleet
from .workload import FIRST_TOKEN_ID, Request


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """From `at_s` on, `rank` runs at `share` of its core's speed."""

    at_s: float
    rank: int
    share: float


class Timeline(msgspec.Struct, kw_only=True):
    """One request. Times in seconds since the start of the run."""

    arrival_s: float
    num_context: int
    token_s: list[float] = []  # arrival of each token
    finish_reason: str | None = None


def run_workload(
    fleet: EmulatedFleet, requests: Sequence[Request], throttles: Sequence[Throttle] = ()
) -> list[Timeline]:
    """Timelines in the order of `requests`, when all are finished. RuntimeError if one fails."""
    timelines = [Timeline(arrival_s=r.arrival_s, num_context=len(r.token_ids)) for r in requests]
    num_running, begin = len(requests), time.monotonic()
    with fleet.client.inbox() as inbox:
        threading.Thread(target=play_or_end, args=(fleet, requests, throttles, begin, inbox), daemon=True).start()
        while num_running:
            num_running -= take(inbox.get(), timelines, time.monotonic() - begin)
    return timelines


def play_or_end(fleet: EmulatedFleet, *arguments: Any) -> None:
    """Plays. If that fails it ends the fleet, for nothing answers requests that were not sent."""
    try:
        play(fleet, *arguments)
    except BaseException:
        fleet.client.close()
        raise


def play(
    fleet: EmulatedFleet, requests: Sequence[Request], throttles: Sequence[Throttle], begin: float, inbox: Inbox
) -> None:
    """Sends each request and applies each throttle at its time after `begin` (seconds, monotonic clock)."""
    events: list[tuple[float, Callable[[], None]]] = [
        (request.arrival_s, partial(fleet.client.open, [engine_request(index, request)], inbox))
        for index, request in enumerate(requests)
    ]
    events += [(each.at_s, partial(fleet.set_share, each.rank, each.share)) for each in throttles]
    for at_s, act in sorted(events, key=lambda event: event[0]):
        time.sleep(max(0.0, begin + at_s - time.monotonic()))
        act()


def warm_up(fleet: EmulatedFleet, num_requests: int) -> None:
    """Runs short requests concurrently, so that one-off costs (first calls, first touch of memory) are paid."""
    request = Request(arrival_s=0.0, token_ids=list(range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + 128)), num_generated=4)
    run_workload(fleet, [request] * num_requests)


def engine_request(index: int, request: Request) -> EngineRequest:
    params = SamplingParams(max_tokens=request.num_generated, temperature=0, ignore_eos=True, detokenize=False)
    return EngineRequest(str(index), str(index), index, None, request.token_ids, params, [0], None)


def take(piece: Piece, timelines: list[Timeline], now_s: float) -> bool:
    """Records tokens that arrived at `now_s`; True if their request finished with them."""
    timeline = timelines[piece.prompt_index]
    timeline.token_s += [now_s] * len(piece.token_ids)
    if piece.error is not None:
        raise RuntimeError(f"request {piece.prompt_index} ({timeline.num_context} tokens) failed: {piece.error}")
    timeline.finish_reason = piece.finish_reason
    return piece.finished
