"""How good a placement can be at best: a proof by prices that some limit is out of reach (`problem.py`)."""

from hetis.dispatcher import native
from hetis.dispatcher.problem import Problem, added, helpful, longest_first


def is_possible(problem: Problem, limit_us: float) -> bool:
    """Whether a peak of `limit_us` may be within reach; see `is_possible_ref`."""
    library = native.load() if problem.num_sequences else None
    if library is None:
        return is_possible_ref(problem, longest_first(problem), limit_us)
    return library.is_possible(problem, limit_us)


def least_possible_us(problem: Problem, highest_us: float) -> float:
    """A lower bound of the peak; see `least_possible_us_ref`."""
    library = native.load() if problem.num_sequences else None
    return (least_possible_us_ref if library is None else library.least_possible_us)(problem, highest_us)


def is_possible_ref(problem: Problem, order: list[int], limit_us: float) -> bool:
    """False: no placement keeps every device within `limit_us`, not even one of lanes that can be cut. True: unknown.

    Each device is given its scarcer resource alone, time or pages, of which a lane takes a share. Filling the devices
    that do long lanes comparatively badly with the shortest lanes, and so on, is then the best there is; the sequence
    that two neighbours divide sets their relative price. If at these prices all lanes, each where it is cheapest, cost
    more than all devices are worth, nothing can fit (weak duality), however the prices came about.
    """
    devices = [_shares(problem, device, limit_us) for device in helpful(problem, limit_us)]
    if not devices:
        return False
    longest, shortest = order[0], order[-1]
    devices.sort(key=lambda shares: shares[shortest] / shares[longest])
    lengths = reversed(order)
    j, left, price, prices = next(lengths), float(problem.num_lanes), 1.0, [1.0]
    for shares, following in zip(devices, [*devices[1:], None], strict=True):
        room = 1.0
        while left * shares[j] <= room:
            room -= left * shares[j]
            longer = next(lengths, None)
            if longer is None:
                return True
            j, left = longer, float(problem.num_lanes)
        left -= room / shares[j]
        if following is not None:
            price *= shares[j] / following[j]
            prices.append(price)
    priced = [[price * share for share in shares] for price, shares in zip(prices, devices, strict=True)]
    cost: float = problem.num_lanes * added(min(column) for column in zip(*priced, strict=True))
    return cost <= added(prices) * (1 + 1e-9)


def least_possible_us_ref(problem: Problem, highest_us: float) -> float:
    """A lower bound of the peak, to a thousandth, given that `highest_us` is reached by some placement."""
    order = longest_first(problem)
    lowest_us = 0.0
    while highest_us - lowest_us > 1e-3 * highest_us:
        middle_us = (lowest_us + highest_us) / 2
        if is_possible_ref(problem, order, middle_us):
            highest_us = middle_us
        else:
            lowest_us = middle_us
    return lowest_us


def _shares(problem: Problem, device: int, limit_us: float) -> list[float]:
    """[J] the share that one lane takes of a device's time or pages, whichever is scarcer for all lanes together."""
    budget_us, free, pages = limit_us - problem.start_us[device], problem.free_pages[device], problem.pages(device)
    if sum(pages) * budget_us > added(problem.lane_us[device]) * free and all(pages):
        return [count / max(free, 0.5) for count in pages]
    return [cost_us / budget_us for cost_us in problem.lane_us[device]]
