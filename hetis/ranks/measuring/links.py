"""Measurement of a link: round trips of messages of many sizes over the link that steps use, without other traffic.

The primary announces the sizes of the next requests and replies, which the worker acknowledges, so that sizes and their
number can follow the speed of the link. Zeros end the measurement. Messages are whole lanes, repeated as in the layers
of a step, written by one end and read by the other.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.core.measurements import TransferSample
from hetis.ranks.measuring.rounds import MIN_POINTS, Call, Point, device_timer, spread, time_points

ANNOUNCEMENT_BYTES = 16
ACKNOWLEDGEMENT_BYTES = 8
ROUND_TRIPS = 3  # after each announcement
NUM_SIZES = 20  # in each direction
MAX_ROUNDS = 20  # more than by default: processes that wait for each other are disturbed more often

Sizes = tuple[int, int]  # bytes of request and reply
END = (0, 0)


class _Buffers(NamedTuple):
    """Source and target of messages, which must really be written and read."""

    source_B: Tensor
    target_B: Tensor

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device) -> "_Buffers":
        return cls(*(torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)))


def probe_link(
    link: Link, device: torch.device, smallest: Sizes, largest: Sizes, seconds: float
) -> tuple[list[TransferSample], list[TransferSample]]:
    """(request samples, reply samples), measured by the primary while the worker runs `answer_probes`.

    `smallest`: bytes of one lane; messages are multiples of these, up to `largest`. One direction carries a message,
    the other one the smallest message. The time of a message is its round trip less half of the shortest round trip.
    """
    buffers = _Buffers.allocate(max(largest), device)
    requests, replies = (
        [lane_bytes * lanes for lanes in spread(1, max_bytes // lane_bytes, NUM_SIZES)]
        for lane_bytes, max_bytes in zip(smallest, largest, strict=True)
    )
    grid = [
        sizes
        for request, reply in zip(requests, replies, strict=True)
        for sizes in ((request, smallest[1]), (smallest[0], reply))
    ]
    points = [Point(sum(sizes), partial(_announce, link, buffers, sizes)) for sizes in grid]
    times = time_points(points, device_timer(device), seconds, min_points=2 * MIN_POINTS, max_rounds=MAX_ROUNDS)
    _announce(link, buffers, END)
    round_trip_us = [time_us / ROUND_TRIPS for time_us in times]
    half_us = min(round_trip_us) / 2
    return (
        [TransferSample(size, us - half_us) for size, us in zip(requests, round_trip_us[::2], strict=False)],
        [TransferSample(size, us - half_us) for size, us in zip(replies, round_trip_us[1::2], strict=False)],
    )


def _announce(link: Link, buffers: _Buffers, sizes: Sizes) -> Call:
    """Announces the sizes of the next round trips to the worker, and returns the call that makes them."""
    announcement = link.send_buffer(ANNOUNCEMENT_BYTES)
    announcement.view(torch.int64).copy_(torch.tensor(sizes))
    link.send()
    link.recv(ACKNOWLEDGEMENT_BYTES)
    link.release()

    def round_trips() -> None:
        for _ in range(ROUND_TRIPS):
            _send(link, buffers, sizes[0])
            _receive(link, buffers, sizes[1])

    return round_trips


def answer_probes(link: Link, device: torch.device) -> None:
    """Answers the primary's round trips at the worker's end until the primary ends the measurement."""
    buffers = _Buffers.allocate(0, device)
    while True:
        request, reply = link.recv(ANNOUNCEMENT_BYTES).view(torch.int64).tolist()
        link.release()
        if max(request, reply) > len(buffers.source_B):
            buffers = _Buffers.allocate(max(request, reply), device)
        link.send_buffer(ACKNOWLEDGEMENT_BYTES)
        link.send()
        if (request, reply) == END:
            return
        for _ in range(ROUND_TRIPS):
            _receive(link, buffers, request)
            _send(link, buffers, reply)


def _send(link: Link, buffers: _Buffers, num_bytes: int) -> None:
    link.send_buffer(num_bytes).copy_(buffers.source_B[:num_bytes])
    link.send()


def _receive(link: Link, buffers: _Buffers, num_bytes: int) -> None:
    buffers.target_B[:num_bytes].copy_(link.recv(num_bytes))
    link.release()
