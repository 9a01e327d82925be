"""Errors of the command line: one sentence each, with the option, its value and the remedy."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hetis.cli.arguments import engine_arguments, engine_config, sampling_params
from hetis.cli.main import build_parser, parse
from hetis.cli.version import version_text
from hetis.core.config import EngineConfig
from hetis.core.sampling_params import SamplingParams

COMMANDS = (["serve"], ["generate"], ["profile"], ["bench", "throughput"], ["bench", "latency"])
SIGNED = {"--seed", "--sampling-seed"}  # any integer of 64 bits
NONSENSE = ("nan", "inf", "1e400", "x", "", "9" * 400)


def leaf(command: list[str]) -> argparse.ArgumentParser:
    parser = build_parser()
    for word in command:
        [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = commands.choices[word]
    return parser


def numeric() -> Iterator[tuple[list[str], str]]:
    """(command, option) for every option that is a number or a size."""
    for command in (*COMMANDS, ["bench", "serve"]):
        for action in leaf(command)._actions:
            if action.metavar in ("N", "X", "SIZE", "SECONDS"):
                yield command, action.option_strings[0]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error for these arguments, which must be the only output."""
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("hetis: ")
    return err.removeprefix("hetis: ").rstrip("\n")


def test_every_number_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    tried = list(numeric())
    assert len(tried) > 50
    for command, option in tried:
        for text in NONSENSE:
            error = refusal([*command, f"{option}={text}"], capsys)
            assert re.match(f"{option}( is |: size )", error), error
        if option not in SIGNED:
            error = refusal([*command, f"{option}=-7"], capsys)
            assert error.startswith(option)
            assert "-7" in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "latency", "--num-iters", "0"], "--num-iters is 0: it must be at least 1."),
        (["bench", "latency", "--batch-size", "0"], "--batch-size is 0: it must be at least 1."),
        (["bench", "throughput", "--num-prompts", "-1"], "--num-prompts is -1: it must be at least 1."),
        (["bench", "throughput", "--input-len", "2.5"], "--input-len is '2.5': it must be a whole number."),
        (["generate", "--max-num-seqs", "0"], "--max-num-seqs is 0: it must be at least 1."),
        (["generate", "--theta", "inf"], "--theta is inf: it must be a positive number, like 0.5."),
        (["generate", "--temperature", "-1"], "--temperature is -1.0, but must be a number from 0 (greedy) to 2."),
        (["generate", "--max-tokens", "many"], "--max-tokens is 'many': it must be a whole number."),
        (["generate", "--seed", str(2**63)], f"--seed is {2**63}: it must be a 64-bit integer."),
        (
            ["generate", "--kv-cache-memory", "2 parsecs"],
            "--kv-cache-memory: size '2 parsecs' is not understood; write for example 2GiB, 512MiB or a number of "
            "bytes.",
        ),
        (
            ["generate", "--kv-cache-memory", "0=1GiB,0=2GiB"],
            "--kv-cache-memory is '0=1GiB,0=2GiB': it names rank 0 twice; write for example 0=1GiB,1=4GiB.",
        ),
        (
            ["generate", "--kv-cache-memory", "-1=1GiB"],
            "--kv-cache-memory needs a value; see `hetis generate --help`.",
        ),
        (
            ["generate", "--max-tokns", "3"],
            "unknown option --max-tokns (did you mean --max-tokens?); see `hetis generate --help`.",
        ),
        (["profile", "a", "b"], "unexpected argument b; see `hetis profile --help`."),
        (
            ["generate", "--dtype", "float8"],
            "--dtype is 'float8' (did you mean float32?); it must be one of auto, float32, bfloat16, float16.",
        ),
        (["serve", "--port", "99999"], "--port is 99999: it must be from 0 (any that is free) to 65535."),
        (["serve", "--max-body-bytes", "5"], "--max-body-bytes is 5: it must be at least 1024."),
        (["serve", "--ssl-cert-reqs", "7"], "--ssl-cert-reqs is '7'; it must be one of 0, 1, 2."),
        (["generate", "--prompt"], "--prompt needs a value; see `hetis generate --help`."),
        (
            ["generate", "--prompt", "a", "--prompt-file", "b"],
            "--prompt-file and --prompt exclude each other: give one of them.",
        ),
        (["genrate"], "'genrate' is not a command (did you mean generate?); see `hetis --help`."),
        (["bench", "speed"], "'speed' is not a kind (did you mean serve?); see `hetis bench --help`."),
    ],
)
def test_the_error_of_wrong_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(arguments, capsys) == sentence


def test_numbers_at_their_limits_are_accepted() -> None:
    options = build_parser().parse_args(
        ["generate", "--migration-budget", "0", "--seed", str(-(2**63)), "--temperature", "0", "--top-k", "-1"]
    )
    assert engine_arguments(options)["migration_budget"] == 0
    assert engine_arguments(options)["seed"] == -(2**63)
    assert sampling_params(options) == SamplingParams(temperature=0, max_tokens=96)
    by_rank = build_parser().parse_args(["profile", "--kv-cache-memory", "0=1KiB,2=1MiB"]).kv_cache_memory
    assert by_rank == {0: 1024, 2: 1 << 20}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_engine_has_its_default(command: list[str]) -> None:
    options = build_parser().parse_args(command)
    assert engine_config(options) == EngineConfig()
    assert {*EngineConfig.__struct_fields__} - {*engine_arguments(options)} == {"logprobs_mode"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_examples(command: list[str]) -> None:
    text = " ".join(leaf(command).format_help().split())
    for default in ("1+0", "2048", "64", "32", "60.0", "256MiB"):
        assert f"(default: {default})" in text
    assert "None" not in text
    examples = re.findall(r"(?<= )hetis (?:serve|generate|bench|profile) [^>|\n]*", leaf(command).epilog or "")
    assert examples
    for example in examples:
        build_parser().parse_args(
            [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example.partition("  ")[0])][1:]
        )


def test_commands_without_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (([], "generate text"), (["bench"], "one batch")):
        options = parse(arguments)
        options.run(options)
        assert word in capsys.readouterr().out


def test_version_names_packages_and_extensions() -> None:
    from importlib.metadata import version

    from hetis import __version__

    text = version_text()
    assert text.startswith(f"hetis {__version__} (Python 3.")
    assert f"torch {version('torch')}" in text
    assert "C++ kernels built" in text


def test_version_and_help_import_no_torch() -> None:
    script = (
        "import sys\nfrom hetis.cli.main import parse\n"
        "try:\n    parse(['--version'])\nexcept SystemExit:\n    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
