"""Sockets for a driver that runs in the test's process, by the test's clock."""

from pathlib import Path

import pytest

from hetis.driver import members
from hetis.driver.watch import Watch
from tests.driver.scripted import Sockets


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sockets:
    found = Sockets(tmp_path)
    monkeypatch.setattr(members, "Watch", lambda plan, timeout: Watch(plan, timeout, clock=lambda: found.now))
    monkeypatch.setattr(members, "END_SECONDS", 0.0)
    monkeypatch.setattr(members, "FAIL_SECONDS", 0.0)
    return found
