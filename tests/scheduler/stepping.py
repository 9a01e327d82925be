"""A scheduler stepped by hand on a small fleet whose pages can be counted."""

from hetis.core.batch import Batch, NewToken
from tests.scheduler.toy_engine import ToyEngine, make_plan
from tests.scheduler.toy_ranks import next_token


def engine_of(num_pages: int = 64, stages: int = 1, **options: int) -> ToyEngine:
    """An engine with two head groups per stage, four tokens per page and no workers."""
    plan = make_plan([[2]] * stages)
    return ToyEngine(plan, dict.fromkeys(range(stages), num_pages), **options)


def answer(engine: ToyEngine, batch: Batch, tokens: list[int] | None = None) -> list[NewToken | None]:
    """Reports `tokens` as drawn by `batch`; None: those of the toy model."""
    if tokens is None:
        drawing = [row.sequence.token_ids for row in batch.rows if row.samples]
        tokens = [next_token(known[-1], len(known)) for known in drawing]
    return engine.scheduler.on_tokens(batch, tokens)


def step(engine: ToyEngine) -> Batch:
    """Schedules and completes one step of a fleet with one stage."""
    batch = engine.scheduler.schedule()
    assert batch is not None
    answer(engine, batch)
    return batch


def finish(engine: ToyEngine) -> None:
    while engine.has_work:
        step(engine)
