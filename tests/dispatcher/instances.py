"""Random min-max problems that can be enumerated, and what every placement must obey."""

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


def check_fits(problem: Problem, counts: Counts) -> None:
    """Every lane is somewhere, at home only its own, and within the pages of each device."""
    assert len(counts) == problem.num_devices
    for j in range(problem.num_sequences):
        assert sum(held[j] for held in counts) == problem.num_lanes
    for device, held in enumerate(counts):
        assert all(0 <= count <= problem.most_lanes[device] for count in held)
        taken = sum(count * pages for count, pages in zip(held, problem.pages(device), strict=True))
        assert taken <= problem.free_pages[device]
