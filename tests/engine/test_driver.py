"""What the driver makes of errors, and what it refuses before anybody loads."""

import importlib.util

import pytest

from hetis.engine import policies
from hetis.engine.driver import verdict_on
from hetis.engine.policies import check_solver


def test_a_value_error_is_the_users_until_the_fleet_is_up_and_then_ours() -> None:
    error = ValueError("the plan does not fit.")
    refused = verdict_on(error, is_up=False)
    assert (str(refused), refused.refused) == ("the plan does not fit.", True)
    failed = verdict_on(error, is_up=True)
    assert (str(failed), failed.refused) == ("the driver failed: ValueError: the plan does not fit.", False)
    assert not verdict_on(KeyError(1), is_up=False).refused


def test_highs_without_scipy_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(policies, "find_spec", lambda name: None if name == "scipy" else find(name))
    with pytest.raises(ValueError, match="pip install scipy"):
        check_solver("highs")
    check_solver("hetis")
