"""The command line parser: argparse with errors in one sentence, suggestions for typing errors, and examples."""

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

USAGE_ERROR = 2  # exit code


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Appends defaults to help texts, except None and booleans, which the texts explain. Examples keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Parser of a command. Refuses unknown options, and suggests the nearest known one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Prints the error as one sentence and exits with code 2."""
        self.exit(USAGE_ERROR, f"hetis: {sentence(message, self.prog, self._option_string_actions)}\n")


def sentence(message: str, command: str, options: Iterable[str] = ()) -> str:
    """An error message of argparse as a sentence. `command`: its name; `options`: those that it has."""
    see_help = f"see `{command} --help`."
    if found := re.fullmatch(r"unrecognized arguments: (\S+).*", message, re.DOTALL):
        name = found[1].partition("=")[0]
        what = "unknown option" if name.startswith("-") else "unexpected argument"
        return f"{what} {name}{did_you_mean(name, options)}; {see_help}"
    found = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
    return message if found is None else _about(found[1], found[2], see_help)


def _about(name: str, what: str, see_help: str) -> str:
    """The error `what` of argparse about the argument `name`, as a sentence."""
    if found := re.fullmatch(r"invalid choice: (.+) \(choose from (.+)\)", what, re.DOTALL):
        value, choices = found[1].strip("'\""), found[2].replace("'", "")
        nearest = did_you_mean(value, choices.split(", "))
        if name.startswith("-"):
            return f"{name} is {value!r}{nearest}; it must be one of {choices}."
        return f"{value!r} is not a {name.lower()}{nearest}; {see_help}"
    if what.startswith("not allowed with argument "):
        return f"{name} and {what.rpartition(' ')[2]} exclude each other: give one of them."
    if what == "expected one argument":
        return f"{name} needs a value; {see_help}"
    return f"{name}{' ' if what.startswith('is ') else ': '}{what}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name as a question in parentheses; empty if none is near."""
    nearest = get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
