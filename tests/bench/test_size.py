"""The size report counts code, not blank lines, comments and docstrings, and lists sub-packages by themselves."""

from pathlib import Path

import pytest
import size

PYTHON = '''"""Docstring of the module,
on two lines."""

import os  # a comment behind code


# a comment
class Some:
    """Docstring."""

    text = """a string

    that is no docstring"""

    def method(self) -> None:
        """Docstring."""
        call(
            1,  # one

            2,
        )
'''
CPP = """// a comment
/* another,
   on two lines */
#include <x.h>

const char* url = "http://host";  // a comment behind code
int f(/* inline */ int x) { return '"' + x; }
"""
SHELL = "#!/bin/sh\n# a comment\n\necho one # two\n"


@pytest.mark.parametrize(("suffix", "text", "count"), [(".py", PYTHON, 9), (".cpp", CPP, 3), (".sh", SHELL, 1)])
def test_code_lines(suffix: str, text: str, count: int) -> None:
    assert size.CODE_LINES[suffix](text) == count


@pytest.mark.parametrize("text", ["", "\n", "# a comment\n", '"""Docstring."""\n'])
def test_a_file_without_code(text: str) -> None:
    assert size.python_code_lines(text) == 0


def test_a_folder_counts_its_own_files_and_a_top_level_folder_all_below_it() -> None:
    sizes = {Path(name): size.Size(code, 2 * code, 1) for name, code in (
        ("hetis/ranks/rank.py", 4), ("hetis/ranks/worker.py", 8), ("hetis/ranks/sampling/draw.py", 16),
        ("hetis/core/plan.py", 32), ("kernels/rope.py", 64), ("setup.py", 1),
    )}  # fmt: skip
    assert size.by_package(sizes) == [
        ("kernels", size.Size(64, 128, 1)),
        ("hetis", size.Size(60, 120, 4)),
        ("  hetis/core", size.Size(32, 64, 1)),
        ("  hetis/ranks/sampling", size.Size(16, 32, 1)),
        ("  hetis/ranks", size.Size(12, 24, 2)),
        (".", size.Size(1, 2, 1)),
    ]


def test_the_report_begins_with_the_longest() -> None:
    long = "def longer():\n" + "    x = 1\n" * 70
    lines = size.report({Path("a/b.py"): "def f(): pass\n", Path("a/c.py"): long}).splitlines()
    files, found = (next(i for i, line in enumerate(lines) if line.startswith(f"longest {what}"))
                    for what in ("files", "functions"))  # fmt: skip
    assert [line.split() for line in lines[files + 1 : found]] == [["71", "a/c.py"], ["1", "a/b.py"]]
    assert [line.split() for line in lines[found + 1 :]] == [["71", "a/c.py:1", "longer"], ["1", "a/b.py:1", "f"]]


def test_every_source_file_of_the_repository_is_counted() -> None:
    """Each has a parser for its suffix, and the packages that are installed are among them."""
    folders = {path.parent.as_posix() for path in size.sources()}
    assert folders > {"hetis/core", "hetis/ranks/sampling", "kernels", "csrc/cpu", "tests/bench", "bench/emulation"}
