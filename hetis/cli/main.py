"""The command `hetis serve | generate | bench | profile`. Under torchrun rank 0 is the root, others are agents."""

import argparse
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import NoReturn

from hetis.cli.arguments import engine_config
from hetis.cli.config_file import with_config
from hetis.cli.parser import CommandParser
from hetis.cli.version import version_text
from hetis.core.config import EngineConfig
from hetis.core.logs import FORMAT_VARIABLE, VARIABLE, set_up_logging
from hetis.frontend.console import drop_output, prepare_streams, write, write_message
from hetis.launch import torchrun
from hetis.processes import supervision
from hetis.processes.failure import report_to_torchrun

# exit codes: those that shells report for processes killed by these signals
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 128 + signal.SIGPIPE
# torchrun ends all ranks when one has ended: the others let rank 0 say first what is wrong with the command line
COMPLAINT_SECONDS = 30.0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from hetis.cli import bench, generate, profile, serve

    parser = CommandParser(
        prog="hetis",
        description="Serves a large language model on several unlike devices at once, split by attention head.",
        epilog="`hetis COMMAND --help` shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=version_text(), help="show versions and exit")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, module, text in (
        ("serve", serve, "serve a model over HTTP, with OpenAI's interface"),
        ("generate", generate, "generate text from one or more prompts"),
        ("bench", bench, "measure throughput, latency, or a running server"),
        ("profile", profile, "measure the speed of every device and of the links between them"),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, epilog=module.EXAMPLES)
        module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Parses the command line and runs the command. Errors of the user and of the fleet are one sentence, exit code 1.

    Ctrl-C exits with 130, and a closed reader of standard output (`hetis generate | head`) with 141, without a message.
    """
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_interruptible:  # nothing is started yet: end at once, without a traceback from an import
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    prepare_streams()
    code = _exit_code(sys.argv[1:] if argv is None else argv, is_interruptible)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback from the interpreter's shutdown
    sys.exit(code)


def _exit_code(argv: list[str], is_interruptible: bool) -> int:
    try:
        code = _run(argv, is_interruptible)
        write("")  # flushes buffered output
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return READER_GONE
    except ValueError as error:
        return _complain(error)


def _complain(error: Exception) -> int:
    report_to_torchrun(str(error))
    write_message(f"hetis: {error}")
    return 1


def _run(argv: list[str], is_interruptible: bool) -> int:
    try:
        options = parse(argv)
    except SystemExit as end:  # of --help, --version and errors
        if end.code and torchrun.under_torchrun() and os.environ.get("RANK") != "0":
            time.sleep(COMPLAINT_SECONDS)
        return int(end.code or 0)
    if "model" in options:
        os.environ[VARIABLE] = options.log_level  # inherited by the processes of the fleet
        serves = "log_format" in options
        if serves:
            os.environ[FORMAT_VARIABLE] = options.log_format
        set_up_logging("", serves=serves)
        if torchrun.under_torchrun():
            _begin_under_torchrun(engine_config(options))
    from hetis.frontend.errors import EngineDeadError

    if is_interruptible:
        sys.unraisablehook = _repeat_interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return options.run(options) or 0
    except EngineDeadError as error:
        return _complain(error)


def _repeat_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Sends Ctrl-C again where Python drops it: in a weak reference's callback, of which an import has many."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()  # when the callback has returned
    else:
        sys.__unraisablehook__(unraisable)


def _begin_under_torchrun(config: EngineConfig) -> None:
    """Returns in the root; every other process is an agent from here to its end. ValueError for wrong variables."""
    torchrun.check_variables()
    if os.environ["RANK"] != "0":
        from hetis.launch.agent import run_under_torchrun

        run_under_torchrun(config.step_timeout)
    supervision.die_with_parent(os.getppid())
    torchrun.is_root = True


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; exits with a message if it is wrong.

    Under torchrun every rank parses the same command line, and only rank 0 writes.
    """
    with ExitStack() as silence:
        if torchrun.under_torchrun() and os.environ.get("RANK") != "0":
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(redirect_stderr(nowhere))
        parser = build_parser()
        try:
            options = parser.parse_args(with_config(parser, argv))
            if "model" in options:
                engine_config(options)
        except ValueError as error:
            write_message(f"hetis: {error}")
            sys.exit(1)
    return options
