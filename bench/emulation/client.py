"""Sends a workload to a fleet at its times, and notes when the tokens come."""

import time
from collections.abc import Sequence

import msgspec

from hetis.core.messages import AddRequest, Outputs
from hetis.core.sampling_params import SamplingParams

from .launch import EmulatedFleet
from .workload import FIRST_TOKEN_ID, Request

LONGEST_POLL_S = 0.2


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """From `at_s` on, `rank` has `share` of its core."""

    at_s: float
    rank: int
    share: float


class Timeline(msgspec.Struct, kw_only=True):
    """One request. Seconds since the beginning of the run."""

    arrival_s: float
    num_context: int
    token_s: list[float] = []  # when each token came
    finish_reason: str | None = None


def run_workload(
    fleet: EmulatedFleet, requests: Sequence[Request], throttles: Sequence[Throttle] = ()
) -> list[Timeline]:
    """Returns when all requests are finished. RuntimeError if one fails."""
    timelines = [Timeline(arrival_s=r.arrival_s, num_context=len(r.token_ids)) for r in requests]
    to_send, to_slow = list(enumerate(requests)), sorted(throttles, key=lambda throttle: throttle.at_s)
    num_running, begin = len(requests), time.monotonic()
    while num_running:
        now = time.monotonic() - begin
        while to_slow and to_slow[0].at_s <= now:
            throttle = to_slow.pop(0)
            fleet.set_share(throttle.rank, throttle.share)
        while to_send and to_send[0][1].arrival_s <= now:
            index, request = to_send.pop(0)
            fleet.client.send(add_request(index, request))
        next_s = min([now + LONGEST_POLL_S, *(r.arrival_s for _, r in to_send[:1]), *(t.at_s for t in to_slow[:1])])
        message = fleet.client.poll(max(0.001, next_s - now))
        if isinstance(message, Outputs):
            num_running -= take(message, timelines, time.monotonic() - begin)
    return timelines


def warm_up(fleet: EmulatedFleet, num_requests: int) -> None:
    """Runs short requests side by side: first calls and first touches of memory cost time that does not come again."""
    request = Request(arrival_s=0.0, token_ids=list(range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + 128)), num_generated=4)
    run_workload(fleet, [request] * num_requests)


def add_request(index: int, request: Request) -> AddRequest:
    params = SamplingParams(max_tokens=request.num_generated, temperature=0, ignore_eos=True, detokenize=False)
    return AddRequest(id=str(index), token_ids=request.token_ids, params=params)


def take(message: Outputs, timelines: list[Timeline], now_s: float) -> int:
    """How many requests finished with this message."""
    num_finished = 0
    for new in message.outputs:
        timeline = timelines[int(new.id)]
        timeline.token_s += [now_s] * len(new.token_ids)
        if new.error is not None:
            raise RuntimeError(f"request {new.id} ({timeline.num_context} tokens) failed: {new.error}")
        if new.finish_reason is not None:
            timeline.finish_reason = new.finish_reason
            num_finished += 1
    return num_finished
