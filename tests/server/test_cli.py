"""The command line, alone and under torchrun: what it prints, what it refuses, and how."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hetis.core.config import EngineConfig
from hetis.core.messages import FleetStats, MemberStats
from hetis.server.arguments import engine_arguments
from hetis.server.cli import build_parser
from hetis.server.generate import LinePrinter, fleet_table, moves
from tests.processes import DEADLINE
from tests.server.fleet_process import ROOT, torchrun_command

HETIS = [sys.executable, "-m", "hetis"]
SMALL = ["--device", "cpu", "--kv-cache-memory", "16MiB"]


def run(command: list[str], directory: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE
    )


def test_generate_streams_every_prompt_and_shows_the_fleet(tmp_path: Path) -> None:
    command = [
        *HETIS,
        "generate",
        "--plan",
        "1+2",
        *SMALL,
        "--prompt",
        "It was",
        "--prompt",
        "The",
        "--max-tokens",
        "30",
    ]
    result = run(command, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert any(line.startswith("[0] It was") for line in lines)
    assert any(line.startswith("[1] The") for line in lines)
    assert sum("attention worker" in line for line in lines) == 2
    assert "tokens/s" in lines[-1]
    assert max(len(line.rstrip()) for line in lines) <= 100


def test_torchrun_makes_the_same_of_the_same_command(tmp_path: Path) -> None:
    arguments = ["generate", "--plan", "1+2", *SMALL, "--max-tokens", "20", "--temperature", "0", "--no-stats"]
    under = run([*torchrun_command("--standalone", "--nproc-per-node", "3"), *arguments], tmp_path)
    alone = run([*HETIS, *arguments], tmp_path)
    assert under.returncode == alone.returncode == 0, under.stderr + alone.stderr
    assert under.stderr == ""
    # lines of different prompts come as they are ready
    texts = [sorted(line for line in r.stdout.splitlines() if line.startswith("[")) for r in (under, alone)]
    assert texts[0] == texts[1] != []


def test_bench_throughput_counts_every_token(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--num-prompts", "5", "--input-len", "17", "--output-len", "4", "--output-json", str(out)]
    result = run([*HETIS, "bench", "throughput", *SMALL, *options], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(out.read_text())
    assert json.loads(result.stdout) == found
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 5 * 21)
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(5 * 21 / found["elapsed_time"])
    assert 0 < found["startup_seconds"] <= found["time_to_first_token_seconds"]


def test_bench_latency_has_percentiles(tmp_path: Path) -> None:
    options = ["--batch-size", "2", "--num-iters", "3", "--input-len", "8", "--output-len", "2"]
    result = run([*HETIS, "bench", "latency", *SMALL, *options], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]


@pytest.mark.parametrize("command", [["generate"], ["bench", "throughput"], ["bench", "latency"]])
def test_help_shows_defaults(command: list[str], tmp_path: Path) -> None:
    result = run([*HETIS, *command, "--help"], tmp_path)
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for default in ("1+0", "2048", "64", "32", "60.0"):
        assert f"(default: {default})" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--plan", "1+x"], "1+x"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--temperature", "-1"], "temperature"),
        (["--theta", "inf"], "theta"),
        (["--step-timeout", "nan"], "step_timeout"),
        (["/no/such/model"], "/no/such/model"),
        (["--kv-cache-memory", "1KiB"], "rank 0"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], word: str, tmp_path: Path) -> None:
    result = run([*HETIS, "generate", "--device", "cpu", *arguments], tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("hetis: ")
    assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--plan", "1+2"], "WORLD_SIZE is 2"),
        (["--plan", "1+1", "--max-num-seqs", "0"], "max_num_seqs"),
        (["--plan", "1+1", "--kv-cache-memory", "1KiB"], "rank 0"),
        (["--plan", "1+1", "--no-such-option"], "--no-such-option"),
    ],
)
def test_under_torchrun_what_cannot_be_is_said_once(arguments: list[str], word: str, tmp_path: Path) -> None:
    command = [*torchrun_command("--standalone", "--nproc-per-node", "2"), "generate", "--device", "cpu", *arguments]
    result = run(command, tmp_path)
    assert result.returncode != 0
    ours, _, _ = result.stderr.partition("torch/distributed")
    said = [line for line in result.stderr.splitlines() if word in line and line.startswith("hetis")]
    assert len(said) == 1, result.stderr
    assert "Traceback" not in ours


@pytest.mark.parametrize(("text", "found"), [("0", 0), ("64MiB", 64 << 20)])
def test_the_migration_budget_may_be_nothing(text: str, found: int) -> None:
    options = build_parser().parse_args(["generate", "--migration-budget", text])
    assert engine_arguments(options)["migration_budget"] == found


def test_a_migration_budget_that_is_not_understood_says_how_to_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "--migration-budget", "much"])
    assert "write for example 2GiB" in capsys.readouterr().err


def test_every_option_of_the_engine_has_its_default() -> None:
    arguments = engine_arguments(build_parser().parse_args(["generate"]))
    del arguments["tokenizer"]
    assert EngineConfig(**arguments) == EngineConfig()


def test_two_hosts_play_one_fleet(tmp_path: Path) -> None:
    """Two torchrun agents on one machine: the control plane goes over TCP."""
    arguments = ["generate", "--plan", "1+1", *SMALL, "--max-tokens", "8", "--temperature", "0"]
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
    assert "attention worker" in texts[0][0]
    assert texts[1][0] == ""


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any port, so that nobody else takes it meanwhile."""
    first = 20_000 + os.getpid() % 10_000
    for port in range(first, first + 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {first} on is free")


# --- what is printed --------------------------------------------------------------------------------------------------


def test_lines_break_at_words_and_carry_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LinePrinter(["a", "b"])
    text = "word " * 50 + "\n\n" + "x" * 150
    for i, character in enumerate(text):
        printer.add(1, character, i == len(text) - 1)
    printer.add(0, "", True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "[0] a"
    assert all(line.startswith("[1] ") and len(line) <= 100 for line in lines[:-1])
    joined = " ".join(line.removeprefix("[1] ") for line in lines[:-1])
    assert joined.split() == ["bword", *["word"] * 49, "x" * 96, "x" * 54]


def test_the_table_of_a_large_fleet_fits_100_columns() -> None:
    from rich.console import Console

    def member(rank: int) -> MemberStats:
        role = "primary" if rank < 2 else "attention worker"
        peers = range(2, 8) if rank < 2 else range(2)
        return MemberStats(
            rank=rank, role=role, device=f"cuda:{rank}", heads=1234, heads_peak=2345, pages_used=12345,
            pages_total=123456, pages_peak=23456, attention_seconds=123.45, attention_share=1.0,
            bytes_sent={f"{rank}->{peer}": 1023 << 30 for peer in peers}, bytes_received={},
            model=None, predicted_us=123.0, measured_us=130.0,
        )  # fmt: skip

    stats = FleetStats(
        members=[member(rank) for rank in range(8)], num_steps=1, num_preemptions=2, num_dispatches=3, num_rebalances=4,
        num_reliefs=5, num_migrations=6, migrated_bytes=7 << 30,
    )  # fmt: skip
    assert "3 sequences placed, 6 lanes moved (7.00 GiB), 2 sequences started over" in moves(stats)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(fleet_table(stats))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert text.count("GiB") == 2 * 6 + 6 * 2
