"""`hetis generate | bench | profile`. Under torchrun the same command line makes a process one rank of the fleet."""

import argparse
import os
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import NoReturn

from hetis.core.config import EngineConfig
from hetis.server import launch
from hetis.server.arguments import HelpFormatter, add_engine_arguments, engine_arguments
from hetis.server.torchrun import under_torchrun


def build_parser() -> argparse.ArgumentParser:
    from hetis.server import bench, generate, profile

    parser = argparse.ArgumentParser(
        prog="hetis", description="LLM serving over fleets of unlike devices, split by attention head."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments, run, text in (
        ("generate", generate.add_arguments, generate.run, "write on from prompts, several at once"),
        ("bench", bench.add_arguments, None, "measure throughput or latency with random prompts"),
        ("profile", profile.add_arguments, profile.run, "measure the speed of every device and link"),
    ):
        command = commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        add_arguments(command)
        if run is not None:
            add_engine_arguments(command)
            command.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Parses, then runs the command; errors of the user and of the fleet end as one sentence and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if under_torchrun():
        launch.run_member(_config(options), argv)
    is_child = launch.fleet_directory is not None
    from hetis.server.client import EngineDeadError

    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except EngineDeadError as error:
        if not is_child:  # else the driver has said it
            _say(error)
        sys.exit(1)
    except ValueError as error:
        _say(error)
        sys.exit(1)
    sys.exit(0)


def parse(argv: list[str]) -> argparse.Namespace:
    """Under torchrun every rank reads the same command line; one is enough to complain about it."""
    with ExitStack() as silence:
        if under_torchrun() and os.environ.get("RANK") != "0":
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        options = build_parser().parse_args(argv)
        try:
            _config(options)
        except ValueError as error:
            _say(error)
            sys.exit(1)
    return options


def _config(options: argparse.Namespace) -> EngineConfig:
    from hetis.server.llm import make_config

    arguments = engine_arguments(options)
    del arguments["tokenizer"]
    return make_config(**arguments)


def _say(error: Exception) -> None:
    sys.stdout.flush()
    print(f"hetis: {error}", file=sys.stderr, flush=True)
