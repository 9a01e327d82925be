"""The front end on an event loop, with a driver in the hands of the test: what it sends, and who gets what comes."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hetis import AsyncLLM, EngineDeadError, Piece, SamplingParams
from hetis.core import messages as m
from hetis.core.token_logprobs import TokenLogprobs
from hetis.frontend.detokenizer import Detokenizer
from hetis.frontend.errors import FleetRefusedError
from hetis.frontend.requests import Request
from hetis.processes.failure import FailureReason
from tests.frontend.stand_in import StandInFleet, make, start, tokenizer
from tests.processes.look import DEADLINE

TOKENS = tokenizer().encode(" also possible to use the True")
STATS = m.FleetStats(
    members=[], num_steps=1, num_preemptions=0, num_dispatches=0, num_rebalances=0, num_reliefs=0, num_migrations=0,
    migrated_bytes=0,
)  # fmt: skip
Story = Callable[[AsyncLLM, StandInFleet], Awaitable[None]]
Run = Callable[[Story], None]


@pytest.fixture
def fleet(directory: Path) -> Iterator[StandInFleet]:
    fleet = StandInFleet(directory)
    yield fleet
    fleet.close()


@pytest.fixture
def run(fleet: StandInFleet, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a story with a fleet that is up."""

    async def play(story: Story) -> None:
        llm = await start(fleet, monkeypatch)
        try:
            await asyncio.wait_for(story(llm, fleet), DEADLINE)
        finally:
            llm.close()

    return lambda story: asyncio.run(play(story))


async def collect(llm: AsyncLLM, request: Request) -> list[Piece]:
    return [piece async for piece in llm.stream(request)]


def output(key: str, *tokens: int, **fields: Any) -> m.TokenOutput:
    return m.TokenOutput(id=key, token_ids=list(tokens), **fields)


# --- requests and pieces ----------------------------------------------------------------------------------------------


def test_pieces_have_what_is_new(run: Run) -> None:
    def row(token: int, value: float) -> TokenLogprobs:
        from array import array

        return TokenLogprobs(array("i", [token]).tobytes(), array("f", [value]).tobytes(), 1)

    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        params = SamplingParams(max_tokens=3, logprobs=0, prompt_logprobs=0, stop_token_ids=[TOKENS[2]], seed=9)
        request = llm.make_request("It was", params, request_id="mine")
        assert (request.id, request.prompt, request.num_completions, request.queued_s) == ("mine", "It was", 1, None)
        pieces = llm.stream(request)
        first = asyncio.ensure_future(anext(pieces))
        sent = await fleet.take()
        prompt = request.prompt_token_ids
        assert (sent.token_ids, sent.prompt_len, sent.seed) == (prompt, len(prompt), 9)
        scores = [row(token, -1.0) for token in prompt[1:]]
        first_row, second_row = row(TOKENS[0], -0.5), row(TOKENS[1], -0.25)
        fleet.tokens(
            output(sent.id, TOKENS[0], logprobs=[first_row], prompt_logprobs=scores, queued_s=0.5, prefill_s=0.25)
        )
        piece = await first
        assert (piece.token_ids, piece.finish_reason, piece.stop_reason) == ([TOKENS[0]], None, None)
        assert piece.logprobs is not None
        assert piece.logprobs[0][TOKENS[0]].logprob == -0.5
        assert request.prompt_logprobs is not None
        assert [list(each or {}) for each in request.prompt_logprobs] == [[], *([token] for token in prompt[1:])]
        assert (request.queued_s, request.prefill_s) == (0.5, 0.25)
        fleet.tokens(output(sent.id, TOKENS[1], logprobs=[second_row]))
        fleet.tokens(
            output(sent.id, TOKENS[2], logprobs=[row(TOKENS[2], -2.0)], finish_reason="stop", stop_reason=TOKENS[2])
        )
        rest = [piece async for piece in pieces]
        assert [piece.token_ids for piece in rest] == [[TOKENS[1]], [TOKENS[2]]]
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == ("stop", TOKENS[2])
        whole = request.output().outputs[0]
        assert whole.text == piece.text + "".join(piece.text for piece in rest) == tokenizer().decode(TOKENS[:2])
        assert whole.cumulative_logprob == -2.75
        assert request.finished

    run(story)


def test_requests_with_equal_ids_are_kept_apart_and_aborted_together(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        requests = [llm.make_request("It", request_id="same") for _ in range(2)]
        other = llm.make_request("It", request_id="other")
        streams = [asyncio.create_task(collect(llm, request)) for request in [*requests, other]]
        first, second, third = await fleet.take_all(3)
        assert len({first.id, second.id, third.id}) == 3
        fleet.tokens(output(first.id, TOKENS[0]), output("nobody's/0", 5), output(third.id, TOKENS[1]))
        await answered(llm, fleet)  # so these have come
        llm.abort("same")
        llm.abort("never was")
        assert {message.id for message in await fleet.take_all(2)} == {first.id, second.id}
        fleet.tokens(output(first.id, TOKENS[1]), output(third.id, TOKENS[2], finish_reason="length"))
        pieces = await asyncio.gather(*streams)
        assert [[piece.token_ids for piece in each] for each in pieces] == [
            [[TOKENS[0]], []],
            [[]],
            [[TOKENS[1]], [TOKENS[2]]],
        ]
        assert [each[-1].finish_reason for each in pieces] == ["abort", "abort", "length"]
        assert requests[0].output().outputs[0].text == tokenizer().decode([TOKENS[0]])

    run(story)


async def answered(llm: AsyncLLM, fleet: StandInFleet) -> None:
    """All that the driver has said before has been read."""
    question = asyncio.create_task(llm.fleet_stats())
    assert await fleet.take() == m.FleetQuery()
    fleet.say(STATS)
    assert await question == STATS


def test_generate_yields_all_so_far(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        outputs = llm.generate("It", SamplingParams(n=2, seed=1), request_id="x")
        first = asyncio.ensure_future(anext(outputs))
        one, two = await fleet.take_all(2)
        assert two.seed == one.seed + 1
        fleet.tokens(output(one.id, TOKENS[0]))
        found = await first
        assert (found.request_id, found.outputs[0].token_ids, found.outputs[1].token_ids) == ("x", [TOKENS[0]], [])
        fleet.tokens(output(one.id, TOKENS[1], finish_reason="length"), output(two.id, TOKENS[0]))
        fleet.tokens(output(two.id, TOKENS[1], finish_reason="stop"))
        await answered(llm, fleet)
        rest = [each async for each in outputs]
        assert len(rest) == 1, "what has come meanwhile is yielded once"
        assert rest[0].finished
        assert [each.token_ids for each in rest[0].outputs] == [TOKENS[:2]] * 2
        assert found.outputs[0].token_ids == [TOKENS[0]], "an output is not changed afterwards"

    run(story)


@pytest.mark.parametrize("how", ["closed", "cancelled", "left", "collected"])
def test_a_stream_that_ends_early_is_aborted(run: Run, how: str) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        pieces = llm.stream(llm.make_request("It", SamplingParams(n=2)))
        first = asyncio.ensure_future(anext(pieces))
        one, two = await fleet.take_all(2)
        fleet.tokens(output(one.id, TOKENS[0]))
        await first
        if how == "closed":
            await pieces.aclose()
        elif how == "cancelled":
            waits = asyncio.create_task(collect_rest(pieces))
            await answered(llm, fleet)
            waits.cancel()
        elif how == "left":
            fleet.tokens(output(one.id, TOKENS[1]))
            async for _ in pieces:
                break
        del first  # it refers to the generator
        del pieces  # left and collected ones are closed by asyncio
        assert {message.id for message in await fleet.take_all(2)} == {one.id, two.id}

    run(story)


async def collect_rest(pieces: Any) -> list[Piece]:
    return [piece async for piece in pieces]


def test_a_stop_string_ends_the_completion_and_aborts_the_sequence(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        stream = asyncio.create_task(collect(llm, llm.make_request("It", SamplingParams(stop="ible"))))
        sent = await fleet.take()
        fleet.tokens(*(output(sent.id, token) for token in TOKENS))
        assert await fleet.take() == m.AbortRequest(id=sent.id)
        pieces = await stream
        assert "".join(piece.text for piece in pieces) == " also poss"
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "ible")

    run(story)


def test_a_tokenizer_that_fails_ends_only_its_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As of the tokenizers library, which is no Exception."""

    append = Detokenizer.append

    def fail(self: Detokenizer, tokens: Any, hide: bool = False) -> tuple[str, str | None]:
        if TOKENS[3] in tokens:
            raise PanicException("planted")
        return append(self, tokens, hide)

    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        monkeypatch.setattr(Detokenizer, "append", fail)
        bad, good = (asyncio.create_task(collect(llm, llm.make_request("It"))) for _ in range(2))
        first, second = await fleet.take_all(2)
        fleet.tokens(output(first.id, TOKENS[3]), output(second.id, TOKENS[0], finish_reason="length"))
        with pytest.raises(PanicException):
            await bad
        assert (await good)[-1].finish_reason == "length"
        assert await fleet.take() == m.AbortRequest(id=first.id)

    run(story)


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", {}, "messages is empty"),
        ([1, 10**6], {}, "messages has token id 1000000"),
        ([1] * 1024, {}, "messages has 1024 tokens, but max_model_len is 1024"),
        (5, {}, "messages is an int"),
        ("It", {"logprobs": 51}, "logprobs is 51"),
        ("It", {"stop_token_ids": [10**6]}, "stop_token_ids is 1000000"),
    ],
)
def test_refusals_name_the_prompt_or_the_field(run: Run, prompt: Any, params: Any, words: str) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        with pytest.raises(ValueError, match=f"^{words}"):
            llm.make_request(prompt, SamplingParams(**params), name="messages")
        with pytest.raises(ValueError, match=r"^request_id is not valid Unicode"):
            llm.make_request("It", request_id="\ud800")

    run(story)


# --- questions --------------------------------------------------------------------------------------------------------


def test_no_answer_is_older_than_its_question(run: Run) -> None:
    """Of one kind one question is sent at a time; an asker that went away disturbs no other."""

    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        first, gone, second = (asyncio.create_task(llm.fleet_stats()) for _ in range(3))
        profile = asyncio.create_task(llm.ask(m.ProfileQuery(), m.ProfileReport))
        assert await fleet.take_all(2) == [m.FleetQuery(), m.ProfileQuery()]
        gone.cancel()
        fleet.say(m.ProfileReport(profile=None), STATS)
        assert (await first, await profile) == (STATS, m.ProfileReport(profile=None))
        assert not second.done()
        for num_steps in (2, 3):
            assert await fleet.take() == m.FleetQuery()
            STATS.num_steps = num_steps
            fleet.say(STATS)
        assert (await second).num_steps == 3

    run(story)


def test_status_and_refusals_are_noted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        assert llm.status is None
        fleet.say(m.Outputs(outputs=[], status=m.EngineStatus(step=5)), m.Outputs(outputs=[]), m.Refused(reason="no"))
        await answered(llm, fleet)
        assert llm.status == m.EngineStatus(step=5)
        assert "the driver refused a message: no" in caplog.text

    run(story)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_failure_that_the_driver_reports_ends_all_calls(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        calls = [asyncio.create_task(collect(llm, llm.make_request("It"))), asyncio.create_task(llm.fleet_stats())]
        await fleet.take_all(2)
        assert (llm.is_ready, llm.is_open, llm.dead_reason) == (True, True, None)
        fleet.say(m.EngineDead(reason="rank 1 failed."))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(error) for error in errors] == ["rank 1 failed."] * 2
        assert errors[0] is not errors[1]
        assert (llm.is_ready, llm.is_open, llm.dead_reason) == (False, False, "rank 1 failed.")
        with pytest.raises(EngineDeadError, match="rank 1 failed"):
            await llm.fleet_stats()
        with pytest.raises(EngineDeadError, match="rank 1 failed"):
            await collect(llm, llm.make_request("It"))

    run(story)


@pytest.mark.parametrize("decides", [False, True])
def test_a_launchers_request_ends_all_calls_unless_the_program_decides(run: Run, decides: bool) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        reasons: list[str] = []
        if decides:
            llm.on_end_request(reasons.append)
        stream = asyncio.create_task(collect(llm, llm.make_request("It")))
        sent = await fleet.take()
        fleet.say(m.EndRequested(reason="torchrun wants it."))
        fleet.tokens(output(sent.id, TOKENS[0], finish_reason="length"))
        if decides:
            assert (await stream)[-1].finish_reason == "length"
            assert (reasons, llm.is_open) == (["torchrun wants it."], True)
        else:
            with pytest.raises(EngineDeadError, match="torchrun wants it"):
                await stream

    run(story)


@pytest.mark.parametrize("has_descriptor", [True, False])
@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        (None, EngineDeadError, "without giving a reason"),
        (FailureReason("the agent died."), EngineDeadError, "the agent died"),
        (FailureReason("it does not fit.", refused=True), FleetRefusedError, "does not fit"),
    ],
)
def test_the_end_of_the_fleet_is_noticed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, has_descriptor: bool, reason: Any, kind: Any, words: str
) -> None:
    fleet = StandInFleet(directory, has_descriptor=has_descriptor)

    async def story() -> None:
        llm = await start(fleet, monkeypatch)
        wait = asyncio.create_task(llm.fleet_stats())
        await fleet.take()
        fleet.die(reason)
        with pytest.raises(kind, match=words):
            await asyncio.wait_for(wait, DEADLINE)
        llm.close()

    asyncio.run(story())
    fleet.close()


def test_close_in_a_thread_ends_the_streams(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        stream = asyncio.create_task(collect(llm, llm.make_request("It")))
        await fleet.take()
        await asyncio.to_thread(llm.close)
        with pytest.raises(EngineDeadError, match="closed"):
            await stream
        assert await fleet.take() == m.Detach()
        assert fleet.has_ended()
        assert not llm.is_open

    run(story)


def test_another_loop_cannot_use_it(fleet: StandInFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = asyncio.run(start(fleet, monkeypatch))
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(llm.fleet_stats())
    llm.close()


def test_before_it_is_ready_nothing_is_known(fleet: StandInFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(fleet, monkeypatch)
    assert not llm.is_ready
    for call in (lambda: llm.max_model_len, lambda: llm.vocab_size, lambda: llm.make_request("It")):
        with pytest.raises(RuntimeError, match="wait_until_ready"):
            call()
    llm.close()
    assert fleet.has_ended()


def test_a_forked_child_cannot_use_it(run: Run) -> None:
    async def story(llm: AsyncLLM, fleet: StandInFleet) -> None:
        child = os.fork()
        if child == 0:
            try:
                await llm.fleet_stats()
            except BaseException as error:
                llm.close()
                os._exit(7 if type(error).__name__ == "ForkedError" and not fleet.has_ended() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        await answered(llm, fleet)

    run(story)
