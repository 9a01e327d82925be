"""Random placement problems with realistic devices, links, models and lengths."""

import math
from random import Random
from typing import NamedTuple

from hetis.dispatcher.problem import Problem

PAGE_SIZE = 32


class Device(NamedTuple):
    bytes_per_us: float
    us_per_head: float
    constant_us: float
    kv_gigabytes: float


DEVICES = (
    Device(2.4e6, 0.010, 7, 40),  # a current data-centre GPU
    Device(1.5e6, 0.012, 7, 30),  # A100
    Device(7.0e5, 0.020, 8, 12),  # RTX 3090
    Device(4.5e5, 0.030, 10, 10),  # P100
    Device(2.4e5, 0.050, 12, 10),  # T4
    Device(1.2e5, 0.100, 4, 60),  # a large CPU host
    Device(2.0e4, 0.080, 3, 30),  # a small one
)
LINKS = ((6, 4e-5), (12, 8e-5), (30, 8e-5), (60, 8e-4), (150, 1e-3))  # round trip us, us per byte
SHAPES = ((8, 8, 128), (8, 4, 128), (4, 8, 128), (2, 8, 64), (1, 32, 64), (1, 40, 128))  # M, G, D


def random_problem(rng: Random, num_sequences: int, num_devices: int) -> Problem:
    """Lengths are log-normal. Half of the fleets are busy already; homes may be several; memory may be scarce."""
    M, G, D = rng.choice(SHAPES)
    num_homes = 1 if rng.random() < 0.6 else min(num_devices, rng.randint(2, 3))
    cuts = sorted(rng.sample(range(1, G), num_homes - 1))
    groups = [high - low for low, high in zip([0, *cuts], [*cuts, G], strict=True)]
    home = rng.choice(DEVICES)
    lengths = [min(32000, max(1, int(rng.lognormvariate(6.9, 1.1)))) for _ in range(num_sequences)]
    kv_bytes, layers, equilibrium_us = 4 * D, rng.choice((1, 24, 60)), rng.choice((0, rng.uniform(5, 200)))
    start_us, floor_us, lane_us, free_pages = [], [], [], []
    for index in range(num_devices):
        device = home if index < num_homes else rng.choice(DEVICES)
        latency_us, us_per_byte = (0, 0.0) if index < num_homes else rng.choice(LINKS)
        slowdown = 1 if index < num_homes else rng.choice((1, 1, 1, 3))
        constant_us = device.constant_us + latency_us
        start_us.append(max(constant_us, equilibrium_us * rng.uniform(0.6, 1.1)))
        floor_us.append(constant_us + rng.uniform(0, 6) if device.bytes_per_us > 1e5 else 0.0)
        sent_us = us_per_byte * (2 * (2 * M + 2) * D + 4 * M)
        per_lane_us = slowdown * M * device.us_per_head + sent_us
        lane_us.append([per_lane_us + slowdown * kv_bytes * length / device.bytes_per_us for length in lengths])
        pages = device.kv_gigabytes * 1e9 / (layers * kv_bytes * PAGE_SIZE)
        free_pages.append(int(pages * rng.choice((1, 0.5, 0.1, 0.02))))
    later = [math.ceil(length / PAGE_SIZE) + 1 for length in lengths]
    return Problem(
        num_lanes=G,
        num_homes=num_homes,
        start_us=start_us,
        floor_us=floor_us,
        lane_us=lane_us,
        most_lanes=[*groups, *[G] * (num_devices - num_homes)],
        home_pages=[rng.randint(0, 1) for _ in later] if rng.random() < 0.6 else later,
        worker_pages=later,
        free_pages=free_pages,
    )
