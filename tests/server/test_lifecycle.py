"""Fleets come and go with their `LLM`, and what cannot be is refused before one starts."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hetis import LLM, SamplingParams
from hetis.server.client import EngineDeadError
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint, make_tokenizer

GREEDY = SamplingParams(max_tokens=6, temperature=0)
SMALL: dict[str, Any] = {"device": "cpu", "kv_cache_memory": "16MiB"}


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 15
    while pids & set(psutil.pids()):
        assert time.monotonic() < deadline, f"still there: {pids & set(psutil.pids())}"
        time.sleep(0.02)


def test_two_at_once_and_one_after_the_other(tmp_path: Path) -> None:
    before = children()
    directory = make_checkpoint(tmp_path, "llama3")
    with LLM(directory, plan="1+1", **SMALL) as first:
        with LLM(**SMALL) as second:
            texts = [second.generate("It was", GREEDY)[0].outputs[0].text for _ in range(2)]
            ids = first.generate("It was", GREEDY)[0].outputs[0].token_ids
        assert texts[0] == texts[1]
        prompt = make_tokenizer(331).encode("It was").ids
        assert ids == greedy_reference(load_reference(directory), prompt, 6)
        assert first.generate(prompt, GREEDY)[0].outputs[0].token_ids == ids, "the other's end is none of its business"
    with LLM(**SMALL) as third:
        assert third.generate("It was", GREEDY)[0].outputs[0].text == texts[0]
    wait_until_gone(children() - before)


def test_deleting_the_last_name_ends_the_fleet() -> None:
    before = children()
    llm = LLM(**SMALL)
    mine = children() - before
    assert len(mine) == 3, "launcher, rank and driver"
    del llm
    gc.collect()
    wait_until_gone(mine)


def test_a_closed_fleet_says_so() -> None:
    llm = LLM(**SMALL)
    stream = llm.stream("It", SamplingParams(max_tokens=900, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("It")
    with pytest.raises(EngineDeadError, match="closed"):
        list(stream)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.fleet_stats()


def test_a_fleet_outlives_the_thread_that_started_it() -> None:
    """The kernel's "end with your parent" means the parent's thread; ours must not be the user's."""
    made: list[LLM] = []
    thread = threading.Thread(target=lambda: made.append(LLM(**SMALL)))
    thread.start()
    thread.join()
    with made[0] as llm:
        assert llm.generate("It", GREEDY)[0].finished


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from hetis import LLM, SamplingParams\n"
        'llm = LLM(device="cpu", kv_cache_memory="16MiB")\n'
        'print(len(llm.generate("It", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))\n'
        'print("torch" in sys.modules)\n'
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["3", "False"], "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "1+x"}, ["1+x"]),
        ({"plan": "9+0"}, ["4"]),  # head groups
        ({"plan": "nowhere.json"}, ["nowhere.json"]),
        ({"model": "/no/such/directory"}, ["/no/such/directory"]),
        ({"dtype": "float8"}, ["dtype", "float8"]),
        ({"load_format": "pickle"}, ["load_format"]),
        ({"block_size": 0}, ["block_size"]),
        ({"block_size": "32"}, ["block_size"]),
        ({"max_model_len": -1}, ["max_model_len"]),
        ({"kv_cache_memory": "2 parsecs"}, ["2 parsecs"]),
        ({"kv_cache_memory": {3: "1GiB"}}, ["3"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size"]),
        ({"trace": "/no/such/folder/trace.json"}, ["trace file /no/such/folder/trace.json", "No such file"]),
        ({"seed": 2**64}, ["seed", str(2**64)]),
        ({"max_num_seqs": 2**40}, ["max_num_seqs", str(2**40)]),
        ({"kv_cache_memory": 2**70}, [str(2**70), "more than any memory"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(options: dict[str, Any], words: list[str]) -> None:
    before = children()
    with pytest.raises(ValueError) as caught:
        LLM(**({"device": "cpu"} | options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert children() == before


def test_what_does_not_fit_the_memory_is_refused_with_the_numbers() -> None:
    before = children()
    with pytest.raises(ValueError, match=r"rank 0.*\d"):
        LLM(device="cpu", kv_cache_memory="1KiB")
    wait_until_gone(children() - before)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5Model"], "model_type": "t5"}')
    with pytest.raises(ValueError, match="T5Model"):
        LLM(tmp_path)
