"""Fleets start and end with their `LLM`, and impossible settings are refused before one starts."""

import gc
import inspect
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

import hetis
from hetis import LLM, EngineConfig, SamplingParams
from hetis.frontend.errors import EngineDeadError
from hetis.frontend.tokenizer import load_tokenizer
from hetis.launch.checks import end_of_sequence_ids
from hetis.models.end_tokens import read_eos_token_ids
from hetis.models.hub import PACKAGED
from tests.checkpoints import greedy_reference, load_reference, make_checkpoint, make_tokenizer
from tests.processes.look import DEADLINE, family, wait_until

GREEDY = SamplingParams(max_tokens=6, temperature=0)
SMALL: dict[str, Any] = {"device": "cpu", "kv_cache_memory": "16MiB"}


def children() -> set[psutil.Process]:
    return set(family(psutil.Process())[1:])


def wait_until_gone(processes: set[psutil.Process]) -> None:
    """Does not reap them: their parent has to read their wait status."""
    wait_until(lambda: not any(process.is_running() for process in processes), "they have ended")


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
        assert first.generate(prompt, GREEDY)[0].outputs[0].token_ids == ids, "the end of the other one changes nothing"
    with LLM(**SMALL) as third:
        assert third.generate("It was", GREEDY)[0].outputs[0].text == texts[0]
    wait_until_gone(children() - before)


def test_deleting_the_last_reference_ends_the_fleet() -> None:
    before = children()
    llm = LLM(**SMALL)
    mine = children() - before
    assert len(mine) == 3, "agent, rank and driver"
    del llm
    gc.collect()
    wait_until_gone(mine)


def test_calls_to_a_closed_fleet_raise() -> None:
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
    """The kernel's signal at the end of the parent comes at the end of the thread that started the child."""
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
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["3", "False"], "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "1+x"}, ["1+x"]),
        ({"plan": "0+1"}, ["0+1", "no primary"]),
        ({"plan": "nowhere.json"}, ["nowhere.json"]),
        ({"model": "/no/such/directory"}, ["/no/such/directory"]),
        ({"dtype": "float8"}, ["dtype is 'float8'; known: auto, float32, bfloat16, float16."]),
        ({"load_format": "pickle"}, ["load_format is 'pickle'; known: auto, safetensors, dummy."]),
        ({"logprobs_mode": "processed"}, ["known: raw_logprobs, raw_logits."]),
        ({"dispatch": "best"}, ["known: hetis, proportional, "]),
        ({"block_size": 0}, ["block_size"]),
        ({"block_size": "32"}, ["block_size"]),
        ({"max_model_len": -1}, ["max_model_len"]),
        ({"kv_cache_memory": "2 parsecs"}, ["2 parsecs"]),
        ({"kv_cache_memory": {3: "1GiB"}}, ["3"]),
        ({"kv_cache_memory": {"first": "1GiB"}}, ["kv_cache_memory", "first"]),
        ({"kv_cache_memory": 2**70}, [str(2**70), "more than any memory"]),
        ({"tensor_parallel_size": 2}, ["LLM has no option tensor_parallel_size; known: model, revision, "]),
        ({"plan": {"stages": [{"primaries": [{"heads": 3}]}]}}, ["plan", "heads"]),
        ({"plan": {"stages": []}}, ["plan", "no stage"]),
        ({"plan": 5}, ["plan is 5"]),
        ({"seed": 2**64}, ["seed", str(2**64), "64-bit"]),
        ({"seed": -(2**63) - 1}, ["seed", "64-bit"]),
        ({"max_num_seqs": 2**40}, ["max_num_seqs", str(2**40)]),
        ({"tokenizer": "/no/such"}, ["tokenizer '/no/such'"]),
        ({"revision": "v9"}, ["revision 'v9'", "has no revisions"]),
        ({"trace": "/no/such/folder/trace.json"}, ["trace file /no/such/folder/trace.json", "No such file"]),
    ],
)
def test_impossible_settings_are_refused_before_a_process_starts(options: dict[str, Any], words: list[str]) -> None:
    before = children()
    with pytest.raises(ValueError) as caught:
        LLM(**({"device": "cpu"} | options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert children() == before


def test_a_plan_that_does_not_fit_the_memory_is_refused_with_the_numbers() -> None:
    before = children()
    with pytest.raises(ValueError, match=r"rank 0.*\d"):
        LLM(device="cpu", kv_cache_memory="1KiB")
    wait_until_gone(children() - before)


def test_a_plan_may_be_given_as_a_dict(tmp_path: Path) -> None:
    plan = {"stages": [{"primaries": [{"device": "cpu", "kv_memory": "16MiB"}]}], "attention": [{"kv_memory": "8MiB"}]}
    with LLM(plan=plan, device="cpu") as llm:
        stats = llm.fleet_stats()
    assert [member.role for member in stats.members] == ["primary", "attention worker"]
    assert stats.members[0].pages_total == 2 * stats.members[1].pages_total


def test_the_tokenizers_end_of_sequence_token_ends_a_sequence_as_well(tmp_path: Path) -> None:
    """As in fine-tunes for chat, whose config still names the token of the base model."""
    directory = Path(shutil.copytree(PACKAGED, tmp_path / "model"))
    end = 300
    content = load_tokenizer(PACKAGED, None).convert_ids_to_tokens(end)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": content}))
    other, own = EngineConfig(tokenizer=str(directory)), read_eos_token_ids(PACKAGED, 3072)
    assert own
    assert end_of_sequence_ids(EngineConfig(), directory, 3072) == [*own, end]
    assert end_of_sequence_ids(other, PACKAGED, 3072) == [*own, end]
    assert end_of_sequence_ids(other, PACKAGED, end) == own, "the model has no such token"
    with LLM(directory, **SMALL) as llm:
        params = SamplingParams(max_tokens=9, min_tokens=2, temperature=0, logit_bias={end: 100.0})
        completion = llm.generate("It was", params)[0].outputs[0]
        assert (completion.token_ids[2:], completion.finish_reason, completion.stop_reason) == ([end], "stop", None)
        assert end not in completion.token_ids[:2]


def test_help_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(LLM).parameters
    fields = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}
    assert {name: shown[name].default for name in shown if name != "unknown"} == fields


def test_public_names() -> None:
    assert all(getattr(hetis, name).__name__ == name for name in hetis.__all__)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["T5Model"], "model_type": "t5"}')
    with pytest.raises(ValueError, match="T5Model"):
        LLM(tmp_path)
