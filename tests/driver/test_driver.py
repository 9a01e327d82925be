"""What the driver refuses before ranks load."""

import importlib.util

import pytest

from hetis.engine import policies
from hetis.engine.policies import check_solver


def test_highs_without_scipy_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(policies, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(ValueError, match="pip install scipy"):
        check_solver("highs")
    check_solver("hetis")
