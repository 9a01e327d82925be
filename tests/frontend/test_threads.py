"""One `LLM` in threads, asyncio's executor, under Ctrl-C and in forked children: every call gets its own outputs, and
the end of the fleet ends every wait."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from hetis import LLM, SamplingParams
from hetis.frontend.client import EngineClient
from hetis.frontend.errors import EngineDeadError, ForkedError
from hetis.frontend.options import make_config
from hetis.frontend.requests import Request
from tests.processes.look import DEADLINE, wait_until

PROMPTS = ["The function returns", "It was", "In the beginning of the", "A list is"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)


def texts_alone(llm: LLM) -> dict[str, str]:
    return {prompt: llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in PROMPTS}


def streamed(llm: LLM, prompt: str) -> str:
    return "".join(piece.text for piece in llm.stream(prompt, GREEDY))


def pages_used(llm: LLM) -> int:
    return sum(member.pages_used for member in llm.fleet_stats().members)


def test_threads_get_their_own_outputs(tiny: LLM) -> None:
    expected = texts_alone(tiny)

    def work(index: int) -> None:
        for turn in range(6):
            prompts = [PROMPTS[(index + turn + n) % 4] for n in range(turn % 3 + 1)]
            outputs = tiny.generate(prompts, GREEDY, use_tqdm=False)
            assert [output.outputs[0].text for output in outputs] == [expected[prompt] for prompt in prompts]
            assert streamed(tiny, prompts[0]) == expected[prompts[0]]
            assert len(tiny.fleet_stats().members) == 3

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, index) for index in range(6)]:
            done.result(DEADLINE)


def test_executors_of_asyncio_get_their_own_outputs(tiny: LLM) -> None:
    expected = texts_alone(tiny)

    async def ask() -> list[str]:
        loop = asyncio.get_running_loop()
        waits = [loop.run_in_executor(None, streamed, tiny, prompt) for prompt in PROMPTS * 3]
        return list(await asyncio.wait_for(asyncio.gather(*waits), DEADLINE))

    assert asyncio.run(ask()) == [expected[prompt] for prompt in PROMPTS * 3]


def test_a_stream_may_start_in_one_thread_and_end_in_another(tiny: LLM) -> None:
    stream = tiny.stream(PROMPTS[0], GREEDY)
    first = next(stream).text
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: "".join(piece.text for piece in stream)).result(DEADLINE)
    assert first + rest == texts_alone(tiny)[PROMPTS[0]]


def test_ctrl_c_ends_the_call_and_leaves_the_fleet_usable(tiny: LLM) -> None:
    def interrupt() -> None:
        wait_until(lambda: pages_used(tiny), "the request runs")
        os.kill(os.getpid(), signal.SIGINT)

    def generate() -> None:
        while True:
            tiny.generate(PROMPTS, ENDLESS, use_tqdm=False)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        generate()
    thread.join()
    files = {frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert not any("zmq" in file or "/comm/" in file for file in files), files
    wait_until(lambda: not pages_used(tiny), "its requests are aborted")
    assert texts_alone(tiny)


def test_a_forked_child_gets_an_error_and_the_fleet_continues(tiny: LLM) -> None:
    expected = texts_alone(tiny)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # must not return into pytest
        words = []
        for call in (lambda: tiny.generate("It"), lambda: list(tiny.stream("It")), tiny.fleet_stats):
            try:
                call()
                words.append("answered")
            except ForkedError as error:
                words.append(str(error))
        tiny.close()
        os.write(writer, "\n".join(words).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        words = pipe.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(words) == 3
    assert all(f"belongs to process {os.getpid()}, and a forked child cannot use it" in line for line in words), words
    assert texts_alone(tiny) == expected


SCRIPT = """
import os, sys
from hetis import LLM, SamplingParams
llm = LLM(device="cpu", kv_cache_memory="16MiB")
stream = llm.stream("It", SamplingParams(max_tokens=50, ignore_eos=True))
count = len(next(stream).token_ids)
if os.fork() == 0:
    sys.exit(3)  # with all exit handlers, and the generator collected
print(os.waitstatus_to_exitcode(os.wait()[1]))
print(count + sum(len(piece.token_ids) for piece in stream))
"""


def test_the_end_of_a_forked_child_does_not_end_the_fleet() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert (result.returncode, result.stdout.split()) == (0, ["3", "50"]), result.stderr


@pytest.mark.parametrize("fails", ["sys.executable", "thread"])
def test_processes_end_if_not_all_can_be_started(fails: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent or the front end's thread fails to start, as in a container with a low limit of processes."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "hetis front end":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    if fails == "thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        monkeypatch.setattr(sys, "executable", "")
    before = psutil.Process().children(recursive=True)
    with pytest.raises((RuntimeError, ValueError), match=fails):
        LLM(device="cpu", kv_cache_memory="16MiB")
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert list(directory.iterdir()) == []


def test_closing_from_a_signal_handler_ends_the_call_that_it_interrupts() -> None:
    client = EngineClient(make_config(device="cpu", kv_cache_memory="16MiB"))

    def requests() -> Iterator[Request]:  # called within `open`
        os.kill(os.getpid(), signal.SIGUSR1)
        yield from ()

    before = signal.signal(signal.SIGUSR1, lambda *_: client.close())
    try:
        with client.inbox() as inbox:
            client.open(requests(), inbox)
            with pytest.raises(EngineDeadError, match="closed"):
                inbox.get()
    finally:
        signal.signal(signal.SIGUSR1, before)


def waiting(llm: LLM, pool: ThreadPoolExecutor) -> list[Any]:
    """Three threads that wait for a busy fleet."""

    def ask() -> None:
        while True:
            llm.fleet_stats()

    def stream() -> None:
        while True:
            list(llm.stream(PROMPTS[1], ENDLESS))

    def generate() -> None:
        while True:
            llm.generate(PROMPTS[0], ENDLESS)

    waits = [pool.submit(call) for call in (ask, stream, generate)]
    wait_until(lambda: pages_used(llm), "a request runs")
    return waits


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_the_end_of_the_fleet_reaches_every_thread(end: str) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    llm = LLM(device="cpu", kv_cache_memory="16MiB")
    with ThreadPoolExecutor(3) as pool:
        waits = waiting(llm, pool)
        if end == "closed":
            llm.close()
        else:
            mine = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
            ranks = [each for each in mine if "hetis.launch.member" in each.cmdline()]
            ranks[0].kill()
        for wait in waits:
            with pytest.raises(EngineDeadError, match="closed" if end == "closed" else "rank 0"):
                wait.result(DEADLINE)
    with pytest.raises(EngineDeadError):
        llm.generate("It")
    llm.close()
