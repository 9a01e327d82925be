"""Fixtures of tests that run fleets."""

import pytest

from tests.engine import local_fleet


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the ranks of a test's fleets are; all on one GPU under the marker `gpu`."""
    monkeypatch.setattr(local_fleet, "default_device", request.param)
    return str(request.param)
