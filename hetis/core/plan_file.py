"""Plan files as JSON: their structure (format: `plan_sources.py`), reading, and errors with the place to change."""

import difflib
import json
import re
from pathlib import Path
from typing import NoReturn

import msgspec


class FileMember(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An attention worker, and what primaries have as well. None: left out."""

    rank: int | None = None
    device: str | None = None
    kv_memory: int | str | None = None


class FilePrimary(FileMember, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A primary with the counts of its shares."""

    head_groups: int | None = None
    mlp_columns: int | None = None
    vocab_rows: int | None = None


class FileStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    primaries: list[FilePrimary]
    layers: int | None = None


class PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    stages: list[FileStage]
    attention: list[FileMember] = []


_KINDS = {"": PlanFile, "stages": FileStage, "primaries": FilePrimary, "attention": FileMember}
_INVALID = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")


def read_plan_file(path: Path) -> PlanFile:
    """Raises ValueError, naming the file and the place in it, for one that cannot be read or is no plan."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"plan file {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"plan file {path} is not text in UTF-8 (byte {error.start}).") from error
    try:
        _check_syntax(text)
        return msgspec.json.decode(text, type=PlanFile)
    except msgspec.ValidationError as error:
        raise ValueError(f"plan file {path} is not a plan: {explain(str(error))}.") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"plan file {path} is not JSON: {error}.") from error
    except ValueError as error:
        raise ValueError(f"plan file {path} {error}.") from error


def explain(error: str) -> str:
    """A message of msgspec with the place first; for an unknown field with the known ones and the closest of them."""
    found = _INVALID.fullmatch(error)
    assert found is not None
    what, where = found["what"], found["where"] or ""
    place = f"{where}: " if where else ""
    unknown = _UNKNOWN.fullmatch(what)
    if unknown is None:
        return f"{place}{what[0].lower()}{what[1:]}"
    known = _KINDS[re.sub(r"\[.*?\]", "", where).rpartition(".")[2]].__struct_fields__
    close = difflib.get_close_matches(unknown[1], known, 1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"{place}unknown field `{unknown[1]}`{guess}; known: {', '.join(known)}"


def _check_syntax(text: str) -> None:
    """Raises ValueError with line and column, which msgspec does not give. Its text follows the name of the file."""
    if not text.strip():
        raise ValueError("is empty")
    try:
        json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        end = len(text.rstrip())
        if error.pos >= end or error.msg.startswith("Unterminated string"):
            line = text.count("\n", 0, end) + 1
            raise ValueError(f'ends in the middle (line {line}): a ], }} or " is missing') from None
        reason = f"{error.msg[0].lower()}{error.msg[1:]}"
        raise ValueError(f"is not JSON: line {error.lineno}, column {error.colno}: {reason}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"is not JSON: it has the number {constant}")
