"""A scheduler stepped by hand on a small fleet whose pages can be counted."""

from hetis.core.batch import Batch, NewToken
from tests.scheduler.toy_engine import ToyEngine, make_plan, next_token


def engine_of(num_pages: int = 64, stages: int = 1, **options: int) -> ToyEngine:
    """An engine with two head groups per stage, four tokens per page and no workers."""
    plan = make_plan([[2]] * stages)
    return ToyEngine(plan, dict.fromkeys(range(stages), num_pages), **options)


def answer(engine: ToyEngine, batch: Batch, tokens: list[int] | None = None) -> list[NewToken]:
    """Reports `tokens` as drawn by `batch`; None: those of the toy model."""
    drawn = [next_token(row.sequence.token_ids) for row in batch.rows if row.samples] if tokens is None else tokens
    return engine.scheduler.on_tokens(batch, drawn)


def step(engine: ToyEngine) -> Batch:
    """Schedules and completes one step of a fleet with one stage."""
    batch = engine.scheduler.schedule()
    assert batch is not None
    answer(engine, batch)
    return batch


def finish(engine: ToyEngine) -> None:
    while engine.has_work:
        step(engine)
