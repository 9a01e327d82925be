"""`hetis generate | bench`: the command line. Under torchrun the same command line makes a process one rank of the fleet."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from hetis.comm.supervision import die_with_parent
from hetis.server import launch
from hetis.server.arguments import add_engine_arguments, engine_arguments

Command = Callable[[argparse.Namespace], None]


def build_parser() -> argparse.ArgumentParser:
    from hetis.server import bench, generate

    parser = argparse.ArgumentParser(
        prog="hetis", description="LLM serving over fleets of unlike devices, split by attention head."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add_arguments, run, text in (
        ("generate", generate.add_arguments, generate.run, "write on from prompts, several at once"),
        ("bench", bench.add_arguments, None, "measure throughput or latency with random prompts"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(command)
        if run is not None:
            add_engine_arguments(command)
            command.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Parses, then runs the command; errors of the user and of the fleet end as one sentence and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(argv)
    if launch.under_torchrun():
        from hetis.server.llm import make_config

        arguments = engine_arguments(options)
        del arguments["tokenizer"]
        launch.run_member(make_config(**arguments), argv)
    if launch.FRONT_VARIABLE in launch.os.environ:
        die_with_parent()
    from hetis.server.client import EngineDeadError

    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, EngineDeadError) as error:
        sys.stdout.flush()
        print(f"hetis: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
