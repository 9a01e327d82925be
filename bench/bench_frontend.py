"""CPU time of the front end per streamed token, from a received message to a piece, by part.

    python bench/bench_frontend.py [--streams 64] [--steps 400] [--logprobs 5]

Claim: about 15 us per token at 64 streams without log-probabilities, since the HTTP server may use 60 us per chunk,
everything included. A stand-in driver, in a thread of its own, sends one token per stream and step, of real text; the
times are CPU times of the thread with the event loop.
"""

import argparse
import asyncio
import tempfile
import threading
import time
from array import array
from pathlib import Path
from random import Random

import extras  # noqa: F401 (the path to tests/)
import msgspec

from hetis import AsyncLLM, SamplingParams
from hetis.comm.control import ControlServer, encode
from hetis.core import messages as m
from hetis.core.config import EngineConfig
from hetis.core.token_logprobs import TokenLogprobs
from hetis.frontend import async_llm
from hetis.frontend.requests import Request
from hetis.frontend.tokenizer import encode as encode_text
from hetis.processes.failure import FailureReason

READY = m.EngineReady(max_model_len=1 << 20, vocab_size=3072, ledger="", eos_token_ids=[0])
TEXT = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()


class StandInFleet:
    """Has the interface of `Fleet`; its driver sends what it is given."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.front = directory, b""
        self._server = ControlServer(str(directory), None)

    def fileno(self) -> int | None:
        return None

    def has_ended(self) -> bool:
        return False

    def reason(self) -> FailureReason | None:
        return None

    def end(self) -> None: ...

    def take(self) -> m.Message:
        while (received := self._server.receive("front")) is None:
            self._server.poller.poll(100)
        self.front = received[0]
        message: m.Message = received[1]
        return message

    def send(self, *messages: m.Message | bytes) -> None:
        for message in messages:
            self._server.send("front", self.front, message)

    def close(self) -> None:
        self._server.close()


def steps(ids: list[str], token_ids: list[int], num_steps: int, num_logprobs: int | None) -> list[m.Outputs]:
    """One token for each sequence and step; the last one ends it. Sequences are at different places of the text."""
    random = Random(0)
    starts = [random.randrange(len(token_ids)) for _ in ids]

    def output(index: int, step: int) -> m.TokenOutput:
        token = token_ids[(starts[index] + step) % len(token_ids)]
        row = None
        if num_logprobs is not None:
            others = random.sample(range(READY.vocab_size), num_logprobs)
            values = array("f", [-1.0] * (1 + num_logprobs)).tobytes()
            row = [TokenLogprobs(array("i", [token, *others]).tobytes(), values, 1)]
        reason = "length" if step == num_steps - 1 else None
        return m.TokenOutput(id=ids[index], token_ids=[token], logprobs=row, finish_reason=reason)

    return [m.Outputs(outputs=[output(index, step) for index in range(len(ids))]) for step in range(num_steps)]


async def whole(llm: AsyncLLM, fleet: StandInFleet, requests: list[Request], params: argparse.Namespace) -> float:
    """Seconds of CPU in this thread for all tokens; a step is sent when the streams have taken the one before."""
    taken = asyncio.Semaphore(0)

    async def consume(request: Request) -> None:
        async for _ in llm.stream(request):
            taken.release()

    tasks = [asyncio.create_task(consume(request)) for request in requests]
    ids = [(await asyncio.to_thread(fleet.take)).id for _ in requests]  # type: ignore[attr-defined]
    token_ids = encode_text(llm.tokenizer, TEXT)
    payloads = [encode(step) for step in steps(ids, token_ids, params.steps, params.logprobs)]
    go = threading.Semaphore(1)

    def drive() -> None:
        for payload in payloads:
            go.acquire()
            fleet.send(payload)

    driver = threading.Thread(target=drive)
    begin = time.thread_time()
    driver.start()
    for _ in payloads:
        for _ in requests:
            await taken.acquire()
        go.release()
    await asyncio.gather(*tasks)
    seconds = time.thread_time() - begin
    driver.join()
    return seconds


def us_per_token(call: object, num_tokens: int) -> float:
    begin = time.thread_time()
    call()  # type: ignore[operator]
    return (time.thread_time() - begin) / num_tokens * 1e6


def parts(llm: AsyncLLM, params: argparse.Namespace, sampling: SamplingParams) -> dict[str, float]:
    """Microseconds per token of each part by itself."""
    requests = [llm.make_request("It was", sampling) for _ in range(params.streams)]
    ids = [f"{request.key}/0" for request in requests]
    messages = steps(ids, encode_text(llm.tokenizer, TEXT), params.steps, params.logprobs)
    payloads, num_tokens = [encode(message) for message in messages], params.steps * params.streams
    decoder = msgspec.msgpack.Decoder(m.Outputs | m.FleetStats)
    found = {"message decoded": us_per_token(lambda: [decoder.decode(payload) for payload in payloads], num_tokens)}
    by_id = dict(zip(ids, requests, strict=True))
    added = us_per_token(lambda: [by_id[new.id].add(new) for each in messages for new in each.outputs], num_tokens)
    detokenized = 0.0
    if sampling.detokenize:
        plain = msgspec.structs.replace(sampling, detokenize=False)
        others = [llm.make_request("It was", plain) for _ in range(params.streams)]
        named = {f"{request.key}/0": request for request in others}
        messages = steps(list(named), encode_text(llm.tokenizer, TEXT), params.steps, params.logprobs)
        without = us_per_token(
            lambda: [named[new.id].add(new) for each in messages for new in each.outputs], num_tokens
        )
        detokenized = added - without
    return found | {"record and piece": added - detokenized, "detokenised": detokenized}


async def measure(params: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="hetis-") as directory:
        fleet = StandInFleet(Path(directory))
        setattr(async_llm, "start_fleet", lambda config: fleet)  # noqa: B010 (types know no such assignment)
        llm = AsyncLLM.from_config(EngineConfig(device="cpu"))
        ready = asyncio.create_task(llm.wait_until_ready())
        await asyncio.to_thread(fleet.take)
        fleet.send(READY)
        await ready
        sampling = SamplingParams(max_tokens=params.steps, logprobs=params.logprobs, ignore_eos=True)
        best: dict[str, float] = {}
        for _ in range(params.runs):
            requests = [llm.make_request("It was", sampling) for _ in range(params.streams)]
            seconds = await whole(llm, fleet, requests, params)
            found = parts(llm, params, sampling)
            found["to the streams"] = seconds / (params.steps * params.streams) * 1e6 - sum(found.values())
            best = min(best or found, found, key=lambda each: sum(each.values()))
        for name, us in best.items():
            print(f"{us:7.2f} us  {name}")
        print(f"{sum(best.values()):7.2f} us  per token at {params.streams} streams, the best of {params.runs} runs")
        llm.close()
        fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default 64)")
    parser.add_argument("--steps", type=int, default=400, help="tokens of each (default 400)")
    parser.add_argument("--logprobs", type=int, help="log-probabilities per token (default none)")
    parser.add_argument("--runs", type=int, default=3, help="of which the fastest counts (default 3)")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
