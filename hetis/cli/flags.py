"""Tables of a command's options for the documentation, made from the parser, so that both say the same.

A page has them between `<!-- flags:COMMAND -->` and `<!-- /flags:COMMAND -->`, and `python -m hetis.cli.flags PAGE...`
renews them.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"(<!-- flags:([a-z ]+) -->\n).*?(<!-- /flags:\2 -->)", re.DOTALL)


def flag_table(parser: argparse.ArgumentParser) -> str:
    """A table of the options of a command in Markdown, in the groups and the order of its help."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | | |")
        lines += [f"| {' | '.join(map(_escaped, _cells(action)))} |" for action in actions]
    return "\n".join(lines) + "\n"


def _cells(action: argparse.Action) -> Iterator[str]:
    """Name, default and meaning. Defaults that the meaning explains are left out, as in the help."""
    value = action.metavar if action.choices is None else "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        yield f"`{value}`"
    elif action.nargs == 0:
        yield f"`{action.option_strings[-1]}`"
    else:
        yield f"`{action.option_strings[-1]} {value or action.dest.upper()}`"
    silent = action.default is None or isinstance(action.default, bool)
    yield "" if silent else f"`{action.default}`"
    yield action.help or ""


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def renewed(page: str) -> str:
    """The text of a page with all its tables renewed. Raises ValueError for a command that does not exist."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{flag_table(_command(block[2]))}\n{block[3]}", page)


def _command(name: str) -> argparse.ArgumentParser:
    from hetis.cli.main import build_parser

    parser = build_parser()
    for word in name.split():
        commands = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
        if commands is None or word not in commands.choices:
            raise ValueError(f"<!-- flags:{name} -->: hetis has no command {name!r}.")
        parser = commands.choices[word]
    return parser


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text()))
