"""Laps of a step on a GPU: the time of a kernel counts in the lap in which it was launched."""

import time
from itertools import pairwise

import pytest
import torch

from hetis.core.step_times import Activity
from hetis.ranks.stopwatch import CudaStopwatch, totals_us

CYCLES = 50_000_000  # some 25 ms at 2 GHz


@pytest.mark.gpu
def test_laps_on_a_gpu_hold_what_was_launched_in_them() -> None:
    watch = CudaStopwatch(torch.device("cuda:0"))
    torch.cuda._sleep(1)  # loads its kernel
    for _ in range(2):  # events are reused
        torch.cuda.synchronize()
        begin = time.perf_counter()
        watch.begin()
        watch.lap(Activity.OTHER)
        torch.cuda._sleep(CYCLES)
        watch.lap(Activity.ATTENTION)
        torch.cuda._sleep(3 * CYCLES)
        watch.lap(Activity.DENSE)
        trace = watch.read()
        elapsed_us = (time.perf_counter() - begin) * 1e6
        assert [activity for activity, *_ in trace] == [Activity.OTHER, Activity.ATTENTION, Activity.DENSE]
        assert all(first[2] == second[1] for first, second in pairwise(trace))
        totals = totals_us(trace)
        assert totals[Activity.DENSE] > totals[Activity.ATTENTION] > totals[Activity.OTHER]
        assert sum(totals) <= elapsed_us
