"""Lengths, traces and prompts."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

import hetis
from hetis.bench_serve.prompts import LocalCodec, PromptMaker
from hetis.bench_serve.workloads import Shape, TraceRow, random_shapes, read_trace, scaled, with_prefixes
from hetis.frontend.tokenizer import load_tokenizer

SEED = (0, 0, 0)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MODEL = Path(hetis.__file__).parent / "assets"


def test_random_lengths_cover_their_range() -> None:
    shapes = random_shapes(2000, 100, 10, 0.5, SEED)
    assert {shape.input_len for shape in shapes} == {*range(50, 151)}
    assert {shape.output_len for shape in shapes} == {*range(5, 16)}
    assert random_shapes(3, 100, 10, 0.0, SEED) == [Shape(100, 10)] * 3
    assert {shape.output_len for shape in random_shapes(200, 1, 1, 0.9, SEED)} == {1}


def test_lengths_depend_on_the_seed_only() -> None:
    assert random_shapes(50, 100, 10, 0.5, SEED) == random_shapes(50, 100, 10, 0.5, SEED)
    assert random_shapes(50, 100, 10, 0.5, SEED) != random_shapes(50, 100, 10, 0.5, (1, 0, 0))


def test_every_prefix_is_used() -> None:
    assert {shape.prefix for shape in with_prefixes([Shape(1, 1)] * 200, 3, SEED)} == {0, 1, 2}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_counts_from_its_first_request(tmp_path: Path) -> None:
    rows = ["2023-11-16 18:15:50.5000000,396,109\n", "2023-11-16 18:15:46.2500000,374,44\n"]
    rows.append("2023-11-16 18:16:46.2500000,0,0\n")
    expected = [TraceRow(0.0, 374, 44), TraceRow(4.25, 396, 109), TraceRow(60.0, 1, 1)]
    assert read_trace(write(tmp_path, HEADER + "".join(rows))) == expected
    numbers = "a,ContextTokens,TIMESTAMP,GeneratedTokens\n-,7,3.5,8\n-,5,1.5,6\n"
    assert read_trace(write(tmp_path, numbers)) == [TraceRow(0.0, 5, 6), TraceRow(2.0, 7, 8)]


def test_a_trace_can_be_shorter_and_faster() -> None:
    assert scaled([TraceRow(0.0, 1, 100), TraceRow(8.0, 10, 3)], 0.25, 2.0) == [
        TraceRow(0.0, 1, 25),
        TraceRow(4.0, 2, 1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", "has no column GeneratedTokens"),
        (HEADER, "has no rows"),
        (HEADER + "1,2,3\n2,x,3\n", "line 3: '2', .* is not a time and two numbers"),
        (HEADER + "yesterday,2,3\n", "line 2: 'yesterday'"),
        (HEADER + "nan,2,3\n", "line 2: 'nan'"),
        (HEADER + "1,2\n", "line 2"),
    ],
)
def test_bad_traces_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--dataset-path .*{message}"):
        read_trace(write(tmp_path, text))


def test_a_missing_trace_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        read_trace(tmp_path / "none.csv")


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts(maker: PromptMaker, shapes: Sequence[Shape], prefix_len: int = 0, seed: tuple[int, ...] = SEED):  # type: ignore[no-untyped-def]
    return asyncio.run(maker.make(shapes, prefix_len, seed))


def test_token_ids_come_from_the_vocabulary_and_the_seed() -> None:
    maker = PromptMaker(range(100, 110), None, "")
    [(ids, length), (more, _)] = prompts(maker, [Shape(200, 1), Shape(5, 1)])
    assert (len(ids), length, len(more), set(ids)) == (200, 200, 5, {*range(100, 110)})
    assert prompts(maker, [Shape(200, 1)]) == [(ids, 200)]
    assert prompts(maker, [Shape(200, 1)], seed=(1, 0, 0)) != [(ids, 200)]


def test_requests_of_a_prefix_share_it() -> None:
    maker = PromptMaker(range(1000), None, "")
    made = prompts(maker, [Shape(4, 1, 0), Shape(4, 1, 1), Shape(4, 1, 0)], 20)
    heads, tails = [tuple(ids[:20]) for ids, _ in made], [tuple(ids[20:]) for ids, _ in made]
    assert heads[0] == heads[2] != heads[1]
    assert len({*tails}) == 3
    assert [length for _, length in made] == [24] * 3


def test_texts_have_their_number_of_tokens() -> None:
    [directory] = [path.parent for path in MODEL.rglob("tokenizer.json")]
    codec = LocalCodec(load_tokenizer(directory, None))
    maker = PromptMaker(codec.vocabulary(), codec, "")
    made = prompts(maker, [Shape(length, 1) for length in (1, 7, 300)])
    for (text, length), wanted in zip(made, (1, 7, 300), strict=True):
        assert "\ufffd" not in text
        assert len(asyncio.run(codec.encode(text))) == length == pytest.approx(wanted, abs=max(1, wanted // 50))
