"""`AsyncLLM` on the packaged model: what it generates is what `LLM` does, and nothing of an ended stream stays."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import psutil
import pytest

from hetis import AsyncLLM, EngineDeadError, Piece, SamplingParams
from hetis.frontend.errors import FleetRefusedError
from tests.frontend.reference import GREEDY, PROMPTS, greedy, tokenizer
from tests.processes.look import DEADLINE

ENDLESS = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm(loop: asyncio.Runner) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(plan="1+1", device="cpu", dtype="float32", kv_cache_memory="64MiB", dispatch="even")
    loop.run(llm.wait_until_ready())
    yield llm
    llm.close()


def run(loop: asyncio.Runner, work: Coroutine[Any, Any, Any]) -> Any:
    return loop.run(asyncio.wait_for(work, DEADLINE))


async def pieces_of(llm: AsyncLLM, prompt: Any, params: SamplingParams, request_id: str | None = None) -> list[Piece]:
    return [piece async for piece in llm.stream(llm.make_request(prompt, params, request_id=request_id))]


async def until_idle(llm: AsyncLLM) -> None:
    """Every page is free: each question is answered after the steps before it."""
    while sum(member.pages_used for member in (await llm.fleet_stats()).members):
        pass


def test_streams_at_once_get_their_own_pieces(llm: AsyncLLM, loop: asyncio.Runner) -> None:
    assert (llm.is_ready, llm.is_open, llm.dead_reason) == (True, True, None)
    assert (llm.max_model_len, llm.vocab_size) == (1024, len(tokenizer()))

    async def work() -> None:
        found = await asyncio.gather(*(pieces_of(llm, prompt, GREEDY) for prompt in PROMPTS * 4))
        for prompt, pieces in zip(PROMPTS * 4, found, strict=True):
            tokens = [token for piece in pieces for token in piece.token_ids]
            assert tokens == greedy(prompt, 12)
            whole = tokenizer().decode([*tokenizer().encode(prompt), *tokens])
            assert prompt + "".join(piece.text for piece in pieces) == whole
            assert pieces[-1].finish_reason == "length"
        await until_idle(llm)

    run(loop, work())


def test_generate_gives_cumulative_outputs(llm: AsyncLLM, loop: asyncio.Runner) -> None:
    async def work() -> None:
        params = SamplingParams(n=2, max_tokens=6, seed=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        outputs = [output async for output in llm.generate(PROMPTS[1], params, request_id="mine")]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert {output.request_id for output in outputs} == {"mine"}
        for before, after in pairwise(outputs):
            for one, other in zip(before.outputs, after.outputs, strict=True):
                assert other.text.startswith(one.text)
                assert other.token_ids[: len(one.token_ids)] == one.token_ids
        assert all(len(output.prompt_logprobs or []) == len(output.prompt_token_ids) for output in outputs)
        assert [len(each.token_ids) for each in outputs[-1].outputs] == [6, 6]
        pieces = await pieces_of(llm, PROMPTS[1], params)
        for index, completion in enumerate(outputs[-1].outputs):
            mine = [piece for piece in pieces if piece.index == index]
            assert [token for piece in mine for token in piece.token_ids] == completion.token_ids
            assert [row for piece in mine for row in piece.logprobs or []] == completion.logprobs

    run(loop, work())


@pytest.mark.parametrize("how", ["closed", "cancelled", "aborted"])
def test_an_ended_stream_leaves_no_pages_and_disturbs_no_other(llm: AsyncLLM, loop: asyncio.Runner, how: str) -> None:
    async def work() -> None:
        running = asyncio.Event()

        async def endless(index: int) -> str | None:
            stream = llm.stream(llm.make_request(PROMPTS[0], ENDLESS, request_id=f"{how} {index}"))
            async for piece in stream:
                running.set()
                if how == "closed" and index < 4:
                    await stream.aclose()
                    return "closed"
                if piece.finished:
                    return piece.finish_reason
            return None

        before = (await llm.fleet_stats()).num_steps
        tasks = [asyncio.create_task(endless(index)) for index in range(4)]
        beside = asyncio.create_task(pieces_of(llm, PROMPTS[1], GREEDY))
        await running.wait()
        for index, task in enumerate(tasks):
            if how == "cancelled":
                task.cancel()
            elif how == "aborted":
                llm.abort(f"{how} {index}")
        for task in tasks:
            with suppress(asyncio.CancelledError):
                assert await task == ("abort" if how == "aborted" else "closed")
        tokens = [token for piece in await beside for token in piece.token_ids]
        assert tokens == greedy(PROMPTS[1], 12)
        await until_idle(llm)
        assert (await llm.fleet_stats()).num_steps - before < 900, "they were not computed to their end"

    run(loop, work())


def test_prompts_are_tokenised_in_threads_and_questions_asked_at_once(llm: AsyncLLM, loop: asyncio.Runner) -> None:
    async def work() -> None:
        requests = await asyncio.gather(*(asyncio.to_thread(llm.make_request, "It was " * 50) for _ in range(8)))
        assert len({request.key for request in requests}) == 8
        assert len({tuple(request.prompt_token_ids) for request in requests}) == 1
        stats = await asyncio.gather(*(llm.fleet_stats() for _ in range(8)))
        assert {len(each.members) for each in stats} == {2}

    run(loop, work())


def test_a_plan_that_does_not_fit_is_refused(loop: asyncio.Runner) -> None:
    async def work() -> None:
        with pytest.raises(FleetRefusedError, match=r"rank 0.*\d"):
            async with AsyncLLM(device="cpu", kv_cache_memory="1KiB"):
                pass

    run(loop, work())


def test_the_end_of_the_fleet_reaches_every_stream(loop: asyncio.Runner) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}

    async def work() -> None:
        async with AsyncLLM(device="cpu", kv_cache_memory="16MiB") as llm:
            streams = [llm.stream(llm.make_request(prompt, ENDLESS)) for prompt in PROMPTS]
            for stream in streams:
                await anext(stream)
            mine = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
            next(each for each in mine if "hetis.launch.member" in each.cmdline()).kill()
            for stream in streams:
                with pytest.raises(EngineDeadError, match="rank 0"):
                    async for _ in stream:
                        pass
            assert not llm.is_open
            assert "rank 0" in (llm.dead_reason or "")

    run(loop, work())
