"""`--config FILE`: options of a command from a YAML file. Its keys are the options without dashes in front.

A value is the option's value; true gives an option that takes none; a list repeats an option that may be repeated. What
the command line names as well counts there. `model` is the positional argument MODEL.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hetis.cli.parser import did_you_mean

OPTION = "--config"
_NOT_IN_FILES = {"--help", "--version", OPTION}


def add_config_argument(group: Any) -> None:
    """Adds `--config`."""
    text = "YAML file whose keys are the options of this command; the command line has precedence"
    group.add_argument(OPTION, metavar="FILE", help=text)


def with_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The command line with the options of the file that `--config` names, if it does.

    `parser`: of the command that `argv` names, set so that MODEL defaults to the file's. Raises ValueError for a file
    that cannot be read, or whose keys and values are no options.
    """
    command, leaf = _leaf(parser, argv)
    rest = [*argv[len(command) :]]
    name = _value_of(OPTION, rest)
    if name is None or not any(OPTION in action.option_strings for action in leaf._actions):
        return [*argv]
    found = _read(Path(name))
    words: list[str] = []
    for key, value in found.items():
        if key == "model" and isinstance(value, str):
            leaf.set_defaults(model=value)
            continue
        action = _action(leaf, key, name)
        if not any(_names(word, action) for word in rest):
            words += _words(action, key, value, name)
    return [*command, *words, *rest]


def _leaf(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], argparse.ArgumentParser]:
    """The words of `argv` that name a command, and its parser."""
    words: list[str] = []
    for word in argv:
        commands = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
        if commands is None or word not in commands.choices:
            break
        parser = commands.choices[word]
        words.append(word)
    return words, parser


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """The last value of an option."""
    value = None
    for word, following in zip_longest(words, words[1:]):
        if word == "--":
            break
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{OPTION} {path} cannot be read ({reason}); give a YAML file.") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{OPTION} {path} is not YAML{where}; write lines like `port: 8000`.") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{OPTION} {path} holds no options; write lines like `port: 8000`.")
    return content


def _action(parser: argparse.ArgumentParser, key: str, file: str) -> argparse.Action:
    known = {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option not in _NOT_IN_FILES
    }
    option = f"--{key.replace('_', '-')}"
    if option not in known:
        nearest = did_you_mean(option, known).replace("mean --", "mean ")
        raise ValueError(f"{OPTION} {file}: unknown key {key}{nearest}; the keys are the options of the command.")
    return known[option]


def _names(word: str, action: argparse.Action) -> bool:
    """Whether a word of the command line gives this option, perhaps abbreviated."""
    name = word.partition("=")[0]
    return name in action.option_strings or (
        len(name) > 2 and name.startswith("--") and any(option.startswith(name) for option in action.option_strings)
    )


def _words(action: argparse.Action, key: str, value: Any, file: str) -> Iterator[str]:
    """The words of a command line that give the option this value."""
    option = f"--{key.replace('_', '-')}"
    where = f"{OPTION} {file}: {key}"
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}; it must be true or false.")
        if value:
            yield option
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield f"--no-{option.removeprefix('--')}"
        return
    if isinstance(value, list) and not isinstance(action, argparse._AppendAction):
        raise ValueError(f"{where} is a list; give one value.")
    for one in value if isinstance(value, list) else [value]:
        yield f"{option}={_text(action, where, one)}"


def _text(action: argparse.Action, where: str, value: Any) -> str:
    """The value as on the command line; of a mapping, like rank to memory, `0=1GiB,1=4GiB`."""
    if isinstance(value, dict):
        return ",".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where} is {value!r}; write the value as on the command line.")
    if action.type is None and not action.choices and not isinstance(value, str):  # 1.10 is another text than 1.1
        raise ValueError(f"{where} is the number {value!r}, but must be text; write it in quotes.")
    return str(value)
