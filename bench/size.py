"""Size report: code lines by package, the longest files and the longest functions.

A code line is one that is not blank and holds more than a comment or a docstring. The report informs reviewers; it
never fails. Aims: files of at most 300 lines, functions of at most 60, most under 20.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 300, 60
SHOWN = 10  # files, and functions
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# a string or character literal, which is kept, or a comment
CPP_COMMENT = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


class Size(NamedTuple):
    """One file, or the sum over several."""

    code: int
    lines: int
    files: int

    def plus(self, other: "Size") -> "Size":
        return Size(*(mine + its for mine, its in zip(self, other, strict=True)))


def sources() -> dict[Path, str]:
    """Text of all source files that git tracks or would add, by path from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [Path(name) for name in names if Path(name).suffix in CODE_LINES]
    return {path: (ROOT / path).read_text() for path in paths if (ROOT / path).is_file()}


# --- one file ---------------------------------------------------------------------------------------------------------


def python_code_lines(text: str) -> int:
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            numbers.update(range(token.start[0], token.end[0] + 1))
    numbers -= set(docstring_lines(ast.parse(text)))
    lines = text.splitlines()
    return sum(bool(lines[number - 1].strip()) for number in numbers)


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Numbers of the lines that docstrings of the module, its classes and functions take."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)


def cpp_code_lines(text: str) -> int:
    without = CPP_COMMENT.sub(lambda match: match[1] or "\n" * match[0].count("\n"), text)
    return sum(bool(line.strip()) for line in without.splitlines())


def shell_code_lines(text: str) -> int:
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


CODE_LINES = {".py": python_code_lines, ".cpp": cpp_code_lines, ".h": cpp_code_lines, ".sh": shell_code_lines}


def functions(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(lines, "file:line name") of each Python function, signature and docstring included, decorators not."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}"


# --- the report -------------------------------------------------------------------------------------------------------


def by_package(sizes: Mapping[Path, Size]) -> list[tuple[str, Size]]:
    """A row for each top-level folder with all that is below it, then one for each folder with its own files."""
    totals: dict[str, Size] = defaultdict(lambda: Size(0, 0, 0))
    folders: dict[str, dict[str, Size]] = defaultdict(lambda: defaultdict(lambda: Size(0, 0, 0)))
    for path, size in sizes.items():
        top = path.parts[0] if len(path.parts) > 1 else "."
        totals[top] = totals[top].plus(size)
        folder = path.parent.as_posix()
        folders[top][folder] = folders[top][folder].plus(size)
    rows = []
    for top, total in sorted(totals.items(), key=lambda row: -row[1].code):
        rows.append((top, total))
        if len(folders[top]) > 1:
            rows += [(f"  {name}", size) for name, size in sorted(folders[top].items(), key=lambda row: -row[1].code)]
    return rows


def report(texts: Mapping[Path, str]) -> str:
    sizes = {path: Size(CODE_LINES[path.suffix](text), len(text.splitlines()), 1) for path, text in texts.items()}
    files = sorted(((size.lines, str(path)) for path, size in sizes.items()), reverse=True)
    found = sorted((one for path, text in texts.items() if path.suffix == ".py" for one in functions(path, text)))
    rows = [f"{size.code:7}{size.lines:7}{size.files:7}  {name}" for name, size in by_package(sizes)]
    return "\n".join(
        [
            f"{'code':>7}{'lines':>7}{'files':>7}  by package",
            *rows,
            f"longest files (aim: at most {FILE_LINES} lines)",
            *(f"{lines:7}  {name}" for lines, name in files[:SHOWN]),
            f"longest functions (aim: at most {FUNCTION_LINES} lines)",
            *(f"{lines:7}  {name}" for lines, name in found[: -SHOWN - 1 : -1]),
        ]
    )


if __name__ == "__main__":
    print(report(sources()))
