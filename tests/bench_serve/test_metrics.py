"""Formulas against numbers computed by hand, for answers with given times."""

from itertools import pairwise

import pytest

from hetis.bench_serve.answer import Answer
from hetis.bench_serve.errors import RequestError
from hetis.bench_serve.metrics import failures, figures, peak_chunks, peak_concurrency, summary, token_source


def answer(
    start: float,
    stamps: list[float],
    *,
    tokens: int | None = None,
    due: float | None = None,
    prompt: int = 10,
    failure: RequestError | None = None,
) -> Answer:
    """An answer with a chunk at each of `stamps`."""
    made = Answer(prompt, start if due is None else due)
    made.start = start
    made.texts = ["x"] * len(stamps)
    if stamps:
        made.first, made.last = stamps[0], stamps[-1]
    made.intervals = [after - before for before, after in pairwise(stamps)]
    made.num_tokens, made.output_tokens, made.failure = tokens, tokens or len(stamps), failure
    if failure is not None:
        made.output_tokens = 0
    return made


# sent at 0 s: chunks at 0.5, 0.75, 1.5 s, 5 tokens; sent at 1 s (due at 0.5): a single chunk at 1.25 s; a failed one
ANSWERS = [
    answer(0.0, [0.5, 0.75, 1.5], tokens=5),
    answer(1.0, [1.25], due=0.5, prompt=30),
    answer(1.0, [1.5], failure=RequestError("HTTP 500", "broken")),
]
ALL = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")


def result(goals: dict[str, float] | None = None) -> dict[str, float]:
    return figures(ANSWERS, 2.0, percentiles=(50, 99.5), metrics=ALL, goals_ms=goals or {})


def test_totals_and_throughput() -> None:
    found = result()
    assert (found["completed"], found["failed"], found["duration"]) == (2, 1, 2.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (40, 6)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (
        1.0,
        3.0,
        23.0,
    )
    assert found["request_goodput"] is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ttft", [500, 250]),
        ("tpot", [250]),  # (1.5 - 0.5) / 4; the output of one token has none
        ("itl", [250, 750]),
        ("e2el", [1500, 250]),
        ("client_queue_time", [0, 500]),
        ("e2el_including_client_queue", [1500, 750]),
    ],
)
def test_means_medians_deviations_and_percentiles(name: str, values: list[float]) -> None:
    found, low, high = result(), min(values), max(values)
    assert found[f"mean_{name}_ms"] == pytest.approx(sum(values) / len(values))
    assert found[f"median_{name}_ms"] == found[f"p50_{name}_ms"] == pytest.approx((low + high) / 2)
    assert found[f"std_{name}_ms"] == pytest.approx((high - low) / 2)
    assert found[f"p99.5_{name}_ms"] == pytest.approx(low + 0.995 * (high - low))


def test_percentiles_lie_between_the_closest_values() -> None:
    found = summary("x", [0.001, 0.002, 0.003, 0.004], (25, 90))
    assert (found["p25_x_ms"], found["p90_x_ms"]) == (pytest.approx(1.75), pytest.approx(3.7))
    assert set(summary("x", [], (99,)).values()) == {0.0}


@pytest.mark.parametrize(
    ("goals", "per_second"),
    [
        ({"ttft": 500}, 1.0),
        ({"ttft": 499}, 0.5),
        ({"ttft": 250, "e2el": 250}, 0.5),
        ({"tpot": 250}, 1.0),
        ({"tpot": 249}, 0.5),  # an output of one token has a TPOT of 0
        ({"tpot": 249, "ttft": 200}, 0.0),
    ],
)
def test_goodput_counts_requests_within_all_limits(goals: dict[str, float], per_second: float) -> None:
    assert result(goals)["request_goodput"] == per_second


def test_details_have_a_value_for_every_request() -> None:
    found = result()
    assert found["input_lens"] == [10, 30, 10]
    assert found["output_lens"] == [5, 1, 0]
    assert found["ttfts"] == [0.5, 0.25, 0.5]
    assert found["itls"] == [[0.25, 0.75], [], []]
    assert found["latencies"] == [1.5, 0.25, 0.5]
    assert found["start_times"] == [0.0, 1.0, 1.0]
    assert found["queue_times"] == [0.0, 0.5, 0.0]
    assert found["generated_texts"] == ["xxx", "x", "x"]
    assert found["errors"] == ["", "", "HTTP 500: broken"]


def test_peaks() -> None:
    assert peak_chunks(ANSWERS[:2]) == 2.0  # 0.5 and 0.75; then 1.25 and 1.5
    assert peak_chunks([answer(5.0, [5.5, 6.25, 6.5, 6.75])]) == 3.0
    assert peak_concurrency(ANSWERS[:2]) == 2
    assert peak_concurrency([answer(0.0, [1.0]), answer(1.0, [2.0])]) == 1
    assert (peak_chunks([]), peak_concurrency([])) == (0.0, 0)


def test_no_completed_request_gives_zeros() -> None:
    found = figures(ANSWERS[2:], 2.0, percentiles=(99,), metrics=ALL, goals_ms={"ttft": 1})
    assert (found["completed"], found["request_goodput"], found["mean_ttft_ms"], found["p99_itl_ms"]) == (0, 0, 0, 0)


def test_failures_are_counted_by_kind_with_the_first_message() -> None:
    errors = [("a", "1"), ("b", "2"), ("b", "3")]
    answers = [answer(0.0, [], failure=RequestError(*error)) for error in errors]
    assert list(failures(answers).items()) == [("b", {"count": 2, "first": "2"}), ("a", {"count": 1, "first": "1"})]


def test_the_source_of_token_numbers_is_named() -> None:
    assert token_source(ANSWERS[:1]) == "usage"
    assert token_source(ANSWERS[1:2]) == "chunks"
    assert token_source(ANSWERS) == "usage and chunks"
    assert token_source(ANSWERS[2:]) == ""
