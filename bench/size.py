"""Prints what has become long: files over 300 lines, functions over 60, and the lines of every package.

A report for those who read a change; nothing fails.
"""

import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 300, 60
SUFFIXES = {".py", ".cpp", ".h", ".sh"}


def sources() -> dict[Path, str]:
    """All source files that git tracks, by path from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [Path(name) for name in names if Path(name).suffix in SUFFIXES]
    return {path: (ROOT / path).read_text() for path in paths if (ROOT / path).is_file()}


def long_functions(path: Path, text: str) -> list[tuple[int, str]]:
    """(lines, "file:line name") of each function over the limit."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append((lines, f"{path}:{node.lineno} {node.name}"))
    return found


def package_of(path: Path) -> str:
    """`hetis/server`, `kernels`, `csrc/cpu` …: at most two folders."""
    return "/".join(path.parts[:-1][:2]) or "."


def main() -> None:
    texts = sources()
    lengths = {path: len(text.splitlines()) for path, text in texts.items()}
    files = [(lines, str(path)) for path, lines in lengths.items() if lines > FILE_LINES]
    functions = [one for path, text in texts.items() if path.suffix == ".py" for one in long_functions(path, text)]
    packages: Counter[str] = Counter()
    for path, lines in lengths.items():
        packages[package_of(path)] += lines
    for title, rows in (
        (f"files over {FILE_LINES} lines", sorted(files, reverse=True)),
        (f"functions over {FUNCTION_LINES} lines", sorted(functions, reverse=True)),
        (f"{sum(lengths.values())} lines in {len(lengths)} files", [(n, name) for name, n in packages.most_common()]),
    ):
        print(title)
        print("".join(f"{lines:7} {what}\n" for lines, what in rows), end="")


if __name__ == "__main__":
    main()
