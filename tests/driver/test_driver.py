"""What the driver makes of errors, what it refuses before ranks load, and when it has the statistics of all ranks."""

import importlib.util

import pytest

from hetis.core.device_info import RankStats
from hetis.driver.front_ends import StatsCollector
from hetis.driver.watch import verdict_on
from hetis.engine import policies
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


def test_statistics_are_those_of_the_last_question() -> None:
    """A second question while ranks still answer the first one, as at the end of a run with a trace."""
    collector = StatsCollector(2)
    assert collector.ask(b"front")
    collector.begin()
    assert not collector.ask(b"other"), "one question serves both"
    assert collector.on_stats(RankStats(rank=0, attention_seconds=1.0)) is None
    collector.begin()
    assert collector.on_stats(RankStats(rank=1)) is None, "to the first question"
    assert collector.on_stats(RankStats(rank=1)) is None
    found = collector.on_stats(RankStats(rank=0, attention_seconds=2.0))
    assert found is not None
    assert (sorted(found), found[0].attention_seconds, collector.num_missing) == ([0, 1], 2.0, 0)
    assert collector.take_asking() == {b"front", b"other"}
    assert collector.take_asking() == set()
