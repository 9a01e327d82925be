"""Values that a configuration refuses."""

from datetime import timedelta
from math import inf, nan

import pytest

from hetis.core.config import EngineConfig


@pytest.mark.parametrize(("field", "words"), [("theta", "a positive number"), ("step_timeout", "from 1 to 1000000")])
@pytest.mark.parametrize("value", [inf, -inf, nan, 0.0, -1.0])
def test_numbers_must_be_positive_and_finite(field: str, words: str, value: float) -> None:
    """A number that is not finite would become null in the message to the driver."""
    with pytest.raises(ValueError, match=f"{field} is {value}: it must be .*{words}"):
        EngineConfig(**{field: value})


def test_a_step_timeout_is_longer_than_a_heartbeat() -> None:
    with pytest.raises(ValueError, match=r"step_timeout is 0\.999"):
        EngineConfig(step_timeout=0.999)
    assert EngineConfig(step_timeout=1).step_timeout == 1


def test_a_step_timeout_fits_into_31_bits_of_milliseconds() -> None:
    with pytest.raises(ValueError, match=r"step_timeout is 1e\+300"):
        EngineConfig(step_timeout=1e300)
    longest = EngineConfig(step_timeout=1_000_000).step_timeout
    assert timedelta(seconds=longest) < timedelta(milliseconds=2**31)


def test_a_migration_budget_may_be_zero_but_not_negative() -> None:
    assert EngineConfig(migration_budget=0).migration_budget == 0
    with pytest.raises(ValueError, match="migration_budget"):
        EngineConfig(migration_budget=-1)
