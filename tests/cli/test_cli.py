"""The command line as whole processes, alone and under torchrun: output, errors, exit codes, Ctrl-C."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from hetis import LLM, SamplingParams
from tests.launch.fleet_process import ENDLESS, ROOT, FleetProcess, torchrun_command
from tests.processes.look import DEADLINE

HETIS = [sys.executable, "-m", "hetis"]
SMALL = ["--device", "cpu", "--kv-cache-memory", "16MiB"]
QUIET = ["--log-level", "warning", "--no-stats"]
SILENT = ["--log-level", "error", "--no-stats"]  # ranks of one host compete for cores, which is a warning


def run(command: list[str], text: str | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command to its end. `text`: standard input; None: the null device."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdin=subprocess.DEVNULL if text is None else None,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


def greedy_text(prompt: str, count: int) -> str:
    with LLM(device="cpu", kv_cache_memory="16MiB") as llm:
        return llm.generate(prompt, SamplingParams(max_tokens=count, temperature=0))[0].outputs[0].text


def test_text_goes_to_standard_output_and_everything_else_to_standard_error() -> None:
    options = ["--max-tokens", "60", "--temperature", "0"]
    result = run([*HETIS, "generate", "--plan", "1+2", "--dispatch", "even", *SMALL, *options], text="It was\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == greedy_text("It was", 60), "the text itself, byte by byte"
    lines = result.stderr.splitlines()
    logged = [line for line in lines if " INFO hetis driver: " in line]
    for word in ("model in the package", "rank 0: primary on cpu", "ranks 1-2: attention worker", "dispatch even"):
        assert sum(word in line for line in logged) == 1, word
    assert sum(line.startswith(("1     attention worker", "2     attention worker")) for line in lines) == 2
    assert "60 tokens for 1 prompt in" in lines[-1]


def test_prompts_of_a_file_become_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('{"prompt": "It was"}\n{"prompt_token_ids": [5, 6, 7]}\n')
    options = ["--prompt-file", str(tmp_path / "prompts"), "--json", "--max-tokens", "9", "--ignore-eos"]
    result = run([*HETIS, "generate", *SMALL, *options, *QUIET])
    assert (result.returncode, result.stderr) == (0, "")
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["prompt"], second["prompt_token_ids"]) == ("It was", [5, 6, 7])
    assert [len(line["token_ids"]) for line in (first, second)] == [9, 9]
    assert first["finish_reason"] == second["finish_reason"] == "length"


def test_a_locale_without_unicode_does_not_end_a_run() -> None:
    """The prompt has characters that ASCII cannot encode."""
    options = ["--prompt", "日本 It", "--echo", "--max-tokens", "3"]
    result = run([*HETIS, "generate", *SMALL, *options, *QUIET], PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("?? It")


def test_closed_streams_do_not_end_a_run() -> None:
    command = f"{sys.executable} -m hetis generate {' '.join(SMALL)} --prompt It --max-tokens 3 >&- <&-"
    result = run(["bash", "-c", command])
    assert (result.returncode, result.stdout) == (0, "")
    assert "3 tokens for 1 prompt" in result.stderr


@pytest.mark.parametrize(
    "how", ["logging.getLogger('hetis').setLevel('INFO')", "os.environ['HETIS_LOG_LEVEL'] = 'info'"]
)
def test_a_python_program_sets_the_log_level_of_its_fleet(how: str) -> None:
    script = f"import logging, os\n{how}\nfrom hetis import LLM\nLLM(device='cpu', kv_cache_memory='16MiB').close()\n"
    result = run([sys.executable, "-c", script])
    assert (result.returncode, result.stdout) == (0, "")
    processes = {line.split(":")[2].split("INFO ")[1] for line in result.stderr.splitlines()}
    assert processes == {"hetis driver", "hetis rank 0"}


def test_the_same_command_under_torchrun_gives_the_same_text() -> None:
    arguments = ["generate", "--plan", "1+2", *SMALL, "--max-tokens", "20", "--temperature", "0", *SILENT]
    under = run([*torchrun_command("--standalone", "--nproc-per-node", "3"), *arguments])
    alone = run([*HETIS, *arguments])
    assert under.returncode == alone.returncode == 0, under.stderr + alone.stderr
    assert under.stderr == alone.stderr == ""
    # the order of lines of different prompts is not determined
    texts = [sorted(line for line in r.stdout.splitlines() if line.startswith("[")) for r in (under, alone)]
    assert texts[0] == texts[1] != []


def test_bench_throughput_counts_every_token(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--num-prompts", "5", "--input-len", "17", "--output-len", "4", "--output-json", str(out)]
    result = run([*HETIS, "bench", "throughput", *SMALL, *options, "--log-level", "error"])
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert json.loads(result.stdout) == found
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 5 * 21)
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"], rel=1e-4)
    assert found["tokens_per_second"] == pytest.approx(5 * 21 / found["elapsed_time"], rel=1e-4)
    assert 0 < found["startup_seconds"] <= found["startup_to_first_token_seconds"]
    digits = [number.strip(",").replace(".", "").lstrip("0") for number in result.stdout.split() if number[0].isdigit()]
    assert len(digits) == len(found)
    assert max(map(len, digits)) <= 6, "significant digits"
    assert "5 of 17 + 4 tokens" in result.stderr


def test_bench_latency_has_percentiles() -> None:
    options = ["--batch-size", "2", "--num-iters", "3", "--input-len", "8", "--output-len", "2"]
    result = run([*HETIS, "bench", "latency", *SMALL, *options, "--log-level", "error"])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3, rel=1e-4)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]
    assert "50 % within" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "--plan", "1+x"], "1+x"),
        (["generate", "/no/such/model"], "/no/such/model"),
        (["generate", "--kv-cache-memory", "1KiB"], "rank 0"),
        (["generate", "--device", "cuda:9"], "cuda:9"),
        (["generate", "--prompt-file", "/no/such/file"], "prompt file /no/such/file cannot be read"),
        (["generate", "--trace", "/no/such/file"], "trace file /no/such/file cannot be written"),
        (["profile", "--output", "/no/such/file"], "--output /no/such/file cannot be written"),
        (["bench", "latency", "--output-json", "/no/such/file"], "--output-json /no/such/file cannot be written"),
        (["bench", "throughput", "--output-len", "5000"], "256 and --output-len 5000 make sequences of 5256 tokens"),
        (["bench", "throughput", "--max-model-len", "300"], "320 tokens, but the model and the memory allow 300"),
    ],
)
def test_errors_of_the_user_are_one_sentence(arguments: list[str], word: str) -> None:
    """Errors before a fleet starts, or since it cannot start."""
    result = run([*HETIS, *arguments, *([] if "--device" in arguments else ["--device", "cpu"])])
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("hetis: ")
    assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--plan", "1+2"], "WORLD_SIZE is 2"),
        (["--plan", "1+1", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["--plan", "1+1", "--kv-cache-memory", "1KiB"], "rank 0"),
        (["--plan", "1+1", "--no-such-option"], "--no-such-option"),
    ],
)
def test_under_torchrun_an_error_is_reported_once(arguments: list[str], word: str) -> None:
    command = [*torchrun_command("--standalone", "--nproc-per-node", "2"), "generate", "--device", "cpu", *arguments]
    result = run(command)
    assert result.returncode != 0
    ours, _, _ = result.stderr.partition("torch/distributed")
    found = [line for line in result.stderr.splitlines() if word in line and line.startswith("hetis")]
    assert len(found) == 1, result.stderr
    assert "Traceback" not in ours


def test_two_torchrun_agents_form_one_fleet() -> None:
    """Two agents on one machine stand for two hosts: their control plane uses TCP."""
    arguments = ["generate", "--plan", "1+1", *SMALL, "--max-tokens", "8", "--temperature", "0", "--echo"]
    port = free_port()

    def agent(index: int) -> "subprocess.Popen[str]":
        where = ["--nnodes", "2", "--node-rank", str(index), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = [*torchrun_command(*where, "--nproc-per-node", "1"), *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    agents = [agent(0), agent(1)]
    try:
        texts = [each.communicate(timeout=DEADLINE) for each in agents]
    finally:
        for each in agents:
            each.kill()
    assert [each.returncode for each in agents] == [0, 0], texts
    assert "[0] The function returns" in texts[0][0]
    assert "attention worker" in texts[0][1]
    assert texts[1][0] == ""


def free_port() -> int:
    """A free port below the kernel's ephemeral range, so that no program gets it by asking for any port."""
    first = 20_000 + os.getpid() % 10_000
    for port in range(first, first + 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {first} on is free")


# --- Ctrl-C, and a closed reader --------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("phase", ["starting", "loading", "measuring", "generating"])
def test_ctrl_c_ends_the_command_silently(phase: str) -> None:
    command = [*HETIS, *ENDLESS, "--plan", "1+1", "--no-profile-cache"]
    with tempfile.TemporaryDirectory(prefix="t") as directory, FleetProcess(command, Path(directory)) as fleet:
        if phase == "starting":
            fleet.member("agent")
        elif phase == "loading":
            fleet.until(lambda: list(Path(directory).glob("hetis-*/ranks")), "the driver listens")
        elif phase == "measuring":
            fleet.until(lambda: any("measuring devices" in line for line in fleet.err), "devices are measured")
        else:
            fleet.wait_for("[0]")
        fleet.hurt("front", signal.SIGINT)
        assert fleet.wait() == 128 + signal.SIGINT
        told = (" INFO hetis", " compete for ")
        rest = [line for line in fleet.err if not any(words in line for words in told)]
        assert rest == [], "no process writes a message"
        assert fleet.leftovers() == []


def test_ctrl_c_in_a_callback_of_the_interpreter_is_not_lost() -> None:
    """Python drops what is raised in a weak reference's callback; an import runs many."""
    code = """
import signal, sys, time, weakref
from hetis.cli import main

def interrupt(_):
    signal.raise_signal(signal.SIGINT)

def run(options):
    subject = lambda: None
    reference = weakref.ref(subject, interrupt)
    del subject
    time.sleep(60)

build_parser = main.build_parser
def build():
    parser = build_parser()
    parser.set_defaults(run=run)
    return parser
main.build_parser = build
main.main([])
"""
    result = run([sys.executable, "-c", code])
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.process
def test_a_closed_reader_ends_the_command_silently() -> None:
    command = shlex.join([*HETIS, *ENDLESS, "--plan", "1+1", *SILENT])
    result = run(["bash", "-c", f"{command} | head -c 9; echo ${{PIPESTATUS[0]}}"])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(f"{128 + signal.SIGPIPE}\n")


# --- on a terminal ----------------------------------------------------------------------------------------------------


def on_terminal(command: list[str]) -> tuple[int, str, str]:
    """Runs a command with a terminal as standard error; (exit code, standard output, standard error)."""
    ours, theirs = os.openpty()
    shown = []
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        with os.fdopen(ours, "rb") as terminal, suppress(OSError):  # EIO: the last writer has closed the terminal
            while piece := os.read(terminal.fileno(), 4096):
                shown.append(piece.decode())
        assert process.stdout is not None
        return process.wait(), process.stdout.read(), "".join(shown)


@pytest.mark.process
@pytest.mark.parametrize("options", [[], ["--no-progress"]])
def test_measuring_shows_its_progress_on_a_terminal(options: list[str]) -> None:
    command = ["profile", "--plan", "1+1", "--no-profile-cache", *SMALL, "--log-level", "error"]
    code, out, shown = on_terminal([*HETIS, *command, *options])
    assert (code, out.startswith("Devices")) == (0, True), shown
    assert ("measuring devices and links" in shown) == (not options)
    assert ("/4" in shown) == (not options)
    assert options == [] or shown == ""
