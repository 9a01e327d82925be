"""What a configuration refuses."""

from math import inf, nan

import pytest

from hetis.core.config import EngineConfig


@pytest.mark.parametrize("field", ["theta", "step_timeout"])
@pytest.mark.parametrize("value", [inf, -inf, nan, 0.0, -1.0])
def test_only_positive_numbers_that_end(field: str, value: float) -> None:
    """What is not finite would become null on its way to the driver."""
    with pytest.raises(ValueError, match=f"{field} is {value}: it must be a positive number"):
        EngineConfig(**{field: value})


def test_nothing_may_move_for_balance() -> None:
    assert EngineConfig(migration_budget=0).migration_budget == 0
    with pytest.raises(ValueError, match="migration_budget"):
        EngineConfig(migration_budget=-1)
