"""Random placement problems small enough to enumerate, the enumeration, and the constraints of every placement."""

from itertools import product
from random import Random

from hetis.dispatcher.problem import Counts, Problem


def tiny_problem(rng: Random, num_sequences: int, num_devices: int) -> Problem:
    """Small numbers and coarse lanes, memory often just enough: every decision matters."""
    num_homes = rng.randint(1, min(2, num_devices))
    groups = [rng.randint(1, 3) for _ in range(num_homes)]
    lengths = [rng.randint(1, 12) for _ in range(num_sequences)]
    rates = [(rng.randint(0, 4), rng.randint(1, 6)) for _ in range(num_devices)]
    home_pages = [rng.randint(0, 1) for _ in lengths] if rng.random() < 0.5 else lengths
    return Problem(
        num_lanes=sum(groups),
        num_homes=num_homes,
        start_us=[float(rng.choice((0, 0, rng.randint(1, 40)))) for _ in rates],
        floor_us=[float(rng.choice((0, 0, rng.randint(1, 30)))) for _ in rates],
        lane_us=[[float(per_lane + per_token * length) for length in lengths] for per_lane, per_token in rates],
        most_lanes=[*groups, *[sum(groups)] * (num_devices - num_homes)],
        home_pages=home_pages,
        worker_pages=lengths,
        free_pages=[rng.choice((0, rng.randint(0, 40), 1000)) for _ in rates],
    )


def num_counts(problem: Problem) -> int:
    """Upper bound on the number of placements."""
    return (problem.num_lanes + 1) ** (problem.num_devices * problem.num_sequences)


def all_counts(problem: Problem) -> list[Counts]:
    """Every placement that fits: the brute-force oracle."""
    ways = [way for way in product(*(range(most + 1) for most in problem.most_lanes)) if sum(way) == problem.num_lanes]
    found = []
    for rows in product(ways, repeat=problem.num_sequences):
        counts = [list(column) for column in zip(*rows, strict=True)]
        taken = [
            sum(count * pages for count, pages in zip(held, problem.pages(device), strict=True))
            for device, held in enumerate(counts)
        ]
        if all(pages <= free for pages, free in zip(taken, problem.free_pages, strict=True)):
            found.append(counts)
    return found


def check_counts(problem: Problem, counts: Counts) -> None:
    """All lanes are placed, at home only its own, and within the pages of each device."""
    assert len(counts) == problem.num_devices
    for j in range(problem.num_sequences):
        assert sum(held[j] for held in counts) == problem.num_lanes
    for device, held in enumerate(counts):
        assert all(0 <= count <= problem.most_lanes[device] for count in held)
        taken = sum(count * pages for count, pages in zip(held, problem.pages(device), strict=True))
        assert taken <= problem.free_pages[device]
