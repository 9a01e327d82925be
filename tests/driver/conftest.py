"""Sockets for a driver that runs in the test's process, by the test's clock."""

from pathlib import Path

import pytest

from hetis.driver import members, serving
from hetis.driver.watch import Watch
from tests.driver.scripted import Sockets


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sockets:
    found = Sockets(tmp_path)
    monkeypatch.setattr(members, "Watch", lambda plan, timeout: Watch(plan, timeout, clock=lambda: found.now))
    monkeypatch.setattr(serving, "END_SECONDS", 0.0)
    return found
