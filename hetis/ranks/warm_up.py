"""Made-up steps before the first real one, so that no kernel is compiled while requests wait.

Triton compiles a kernel when it is first launched (0.5 to 2 s each), and CUDA loads a library's code when it is first
used. So every rank of a fleet with a GPU computes the same made-up steps before it is `Ready`: a long prompt and a
token after it, at home and on each worker, with a page transfer each way. They use the very links of later steps, and
pages of which nothing is read before it has been written again.
"""

from collections.abc import Iterator

from hetis.core.batch import Batch, Row
from hetis.core.messages import Setup, StepCommand
from hetis.core.messages.step_command import PageTransfer, encode
from hetis.core.placement import Placement
from hetis.core.request import Sequence
from hetis.core.sampling_params import SamplingParams

LONG = 512  # tokens: lanes of more than 256 are attended to in pieces, which are then merged


def is_needed(setup: Setup) -> bool:
    return any(info.is_gpu for info in setup.fleet)


def warm_up_commands(setup: Setup) -> Iterator[StepCommand]:
    """The same for every rank. All lanes of slot 0 live at home, then on each worker; their pages are page 0."""
    num_tokens = min(setup.max_num_batched_tokens, setup.max_model_len)
    position = min(setup.max_model_len - 1, LONG)
    for worker in (None, *setup.plan.worker_ranks):
        prompt, token = _sequence(num_tokens, num_tokens), _sequence(position, position + 1)
        admitted = [(prompt, _placement(setup, worker))]
        yield encode(0, _batch(Row(sequence=prompt, start=0, count=num_tokens, samples=True), admitted))
        row = Row(sequence=token, start=position, count=1, samples=True)
        yield encode(0, _batch(row, []), transfers=_transfers(setup, worker))


def _sequence(prompt_len: int, num_tokens: int) -> Sequence:
    return Sequence(
        id="",
        token_ids=[0] * num_tokens,
        prompt_len=prompt_len,
        params=SamplingParams(),
        max_tokens=1,
        seed=0,
        stop_ids=frozenset(),
        arrival=0,
        slot=0,
    )


def _batch(row: Row, admitted: list[tuple[Sequence, Placement]]) -> Batch:
    return Batch(rows=[row], admitted=admitted, released=[])


def _placement(setup: Setup, worker: int | None) -> Placement:
    """All lanes on one worker; None: each lane at home."""
    homes = setup.plan.home_ranks
    return Placement(owners=tuple(tuple(home if worker is None else worker for home in stage) for stage in homes))


def _transfers(setup: Setup, worker: int | None) -> list[PageTransfer]:
    """A page to the worker and one back, for the first lane of every home."""
    if worker is None:
        return []
    homes = setup.plan.homes
    there = [PageTransfer(stage, home.groups[0], home.rank, worker, 0, 1) for stage, home in homes]
    back = [PageTransfer(stage, home.groups[0], worker, home.rank, 0, 1) for stage, home in homes]
    return there + back
