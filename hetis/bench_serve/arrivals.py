"""When requests are due, in seconds from the start of a run. Functions of data."""

import numpy as np

from hetis.bench_serve.settings import RampUp

Times = list[float]


def arrival_times(count: int, rate: float, burstiness: float, seed: tuple[int, ...], ramp: RampUp | None) -> Times:
    """Due times of `count` requests, ascending.

    Gaps are drawn from a gamma distribution with mean 1/rate and shape `burstiness`: 1 is a Poisson process, less is
    more bursty, inf is constant. With a constant rate the times are scaled so that the last is count / rate, as in
    vLLM: two seeds then ask for the same throughput. `rate` inf: all at once. With `ramp` its rates replace `rate`.
    """
    rates = np.full(count, rate) if ramp is None else _growing(ramp, count)
    if np.isinf(rates).any():
        return [0.0] * count
    if np.isinf(burstiness):
        gaps = 1.0 / rates
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rates * burstiness))
    times = np.cumsum(gaps)
    if ramp is None and count and times[-1] > 0:
        times *= count / rate / times[-1]
    return [float(time) for time in times]


def _growing(ramp: RampUp, count: int) -> np.ndarray:
    """The rate at each of `count` requests."""
    strategy, start, end = ramp
    progress = np.arange(count) / max(count - 1, 1)
    return start + (end - start) * progress if strategy == "linear" else start * (end / start) ** progress
