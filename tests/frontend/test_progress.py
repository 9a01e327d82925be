"""Progress bars are drawn on a terminal, one at a time, and never in a pipe."""

import io
import sys

import pytest

from hetis.frontend.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replaces stderr. The test itself must call it, since pytest replaces the streams after fixtures have run."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return stream


def test_a_terminal_shows_title_count_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with progress_bar("prompts", 3) as bar:
        bar.advance()
        bar.advance(2, note="7 tokens/s")
    text = terminal.getvalue()
    assert all(part in text for part in ("prompts", "3/3", "7 tokens/s"))


def test_a_bar_is_invisible_if_switched_off_or_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with progress_bar("outer", 1, show=False) as bar:
        bar.advance()
    assert terminal.getvalue() == ""
    with progress_bar("outer", 1), progress_bar("inner", 1) as bar:
        bar.advance(note="unseen")
    assert "outer" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()
    with progress_bar("later", 1):
        pass
    assert "later" in terminal.getvalue()


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    for stream in (pipe, None):  # None: a process without standard streams
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("prompts", 1) as bar:
            bar.advance(note="seen")
    assert pipe.getvalue() == ""
