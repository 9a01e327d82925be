"""Made-up steps before the first real one, so that no kernel is compiled while requests wait.

Triton compiles a kernel when it is first launched (0.5 to 2 s each), and CUDA loads a library's code when it is first
used. So every rank of a fleet with a GPU works off the same commands before it is `Ready`: a long prompt and a token
after it, at home and on each worker, with a page on the move each way. They go over the very links of later steps, and
through pages of which nothing is read before it has been written again.
"""

from collections.abc import Iterator

import numpy as np

from hetis.core.messages import NewSequence, Setup, StepCommand
from hetis.core.sampling_params import SamplingParams

LONG = 512  # tokens: lanes of more than 256 are attended to in pieces, which are then merged


def is_needed(setup: Setup) -> bool:
    return any(info.is_gpu for info in setup.fleet)


def warm_up_commands(setup: Setup) -> Iterator[StepCommand]:
    """The same for every rank. All lanes of slot 0 live at home, then on each worker; their pages are page 0."""
    num_tokens = min(setup.max_num_batched_tokens, setup.max_model_len)
    position = min(setup.max_model_len - 1, LONG)
    for worker in (None, *setup.plan.worker_ranks):
        new = NewSequence(
            slot=0,
            owners=_int32(_owners(setup, worker)),
            prompt_len=num_tokens,
            seed=0,
            params=SamplingParams(),
        )
        yield _command([new], start=0, count=num_tokens, num_decode=0, hauls=[])
        yield _command([], start=position, count=1, num_decode=1, hauls=_hauls(setup, worker))


def _command(
    admitted: list[NewSequence], *, start: int, count: int, num_decode: int, hauls: list[list[int]]
) -> StepCommand:
    """A step of one row, which draws a token."""
    return StepCommand(
        step=0,
        landed=b"",
        released=[],
        admitted=admitted,
        pages=[],
        slots=_int32([0]),
        starts=_int32([start]),
        counts=_int32([count]),
        num_decode=num_decode,
        tokens=_int32([0] * count),
        sampled=_int32([0]),
        hauls=_int32(hauls),
    )


def _owners(setup: Setup, worker: int | None) -> list[list[int]]:
    """[num_stages, G]; None: each lane at home."""
    return [list(homes) if worker is None else [worker] * len(homes) for homes in setup.plan.home_ranks]


def _hauls(setup: Setup, worker: int | None) -> list[list[int]]:
    """A page to the worker and one back, for the first lane of every home."""
    if worker is None:
        return []
    homes = [(stage, home.groups[0], home.rank) for stage, home in setup.plan.homes]
    there = [[stage, row, home, worker, 0, 1] for stage, row, home in homes]
    back = [[stage, row, worker, home, 0, 1] for stage, row, home in homes]
    return there + back


def _int32(values: list[int] | list[list[int]]) -> bytes:
    return np.asarray(values, dtype=np.int32).tobytes()
