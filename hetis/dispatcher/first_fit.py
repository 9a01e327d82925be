"""A placement within a given limit, or none that this rule finds (`problem.py`)."""

from hetis.dispatcher.problem import Counts, Problem, added, helpful


def first_fit(problem: Problem, order: list[int], limit_us: float) -> Counts | None:
    """All lanes with no device above `limit_us`, or None if this rule finds no way.

    Devices are visited by increasing relative cost of long lanes; each takes the longest remaining lanes that fit.
    Several homes, which can take only their share of each sequence, go before the others, each beginning with the
    lengths that would fall to it in that order; if that fails they wait their turn.
    """
    rated = _rated(problem, order, limit_us)
    counts = _take(problem, _homes_first(problem, order, rated), limit_us) if problem.num_homes > 1 else None
    return counts or _take(problem, [(device, order) for _, device, _ in rated], limit_us)


def _take(problem: Problem, wishes: list[tuple[int, list[int]]], limit_us: float) -> Counts | None:
    """Lets each device in turn take what fits of the sequences in its list."""
    left = [problem.num_lanes] * problem.num_sequences
    counts: Counts = [[0] * problem.num_sequences for _ in problem.start_us]
    for device, liked in wishes:
        budget_us, free = limit_us - problem.start_us[device], problem.free_pages[device]
        lane_us, pages, most = problem.lane_us[device], problem.pages(device), problem.most_lanes[device]
        held = counts[device]
        for j in liked:
            cost_us = lane_us[j]
            if cost_us > budget_us or not left[j]:
                continue
            count = min(int(min(budget_us / cost_us, most)), left[j])
            if pages[j] * count > free:
                count = free // pages[j]
            held[j] = count
            left[j] -= count
            budget_us -= count * cost_us
            free -= count * pages[j]
    return None if any(left) else counts


def _rated(problem: Problem, order: list[int], limit_us: float) -> list[tuple[float, int, float]]:
    """(price of a long lane in short ones, device, middle lanes that fit), ascending.

    The price of a lane is the share that it takes of a device's time and of its pages.
    """
    longest, middle, shortest = order[0], order[len(order) // 2], order[-1]
    rated = []
    for device in helpful(problem, limit_us):
        budget_us, free = limit_us - problem.start_us[device], max(problem.free_pages[device], 1e-9)
        lane_us, pages = problem.lane_us[device], problem.pages(device)
        shares = [lane_us[j] / budget_us + pages[j] / free for j in (longest, middle, shortest)]
        rated.append((shares[0] / shares[2], device, 1 / shares[1]))
    return sorted(rated)


def _homes_first(
    problem: Problem, order: list[int], rated: list[tuple[float, int, float]]
) -> list[tuple[int, list[int]]]:
    total = added(fitting for _, _, fitting in rated)
    homes, others, passed = [], [], 0.0
    for _, device, fitting in rated:
        if device < problem.num_homes:
            at = len(order) * passed / max(total - fitting, passed, 1e-300)
            homes.append((device, [j for _, j in sorted((abs(rank + 0.5 - at), j) for rank, j in enumerate(order))]))
        else:
            others.append((device, order))
        passed += fitting
    return homes + others
