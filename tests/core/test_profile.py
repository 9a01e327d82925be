"""The formulas of profiles."""

import pytest

from tests.engine.test_profile_files import DEVICE, LINK


def test_predictions_are_the_formulas() -> None:
    attention = DEVICE.attention
    assert attention.time_us(0, 0) == 0
    assert attention.time_us(8, 0) == 11.5
    assert attention.time_us(64, 100_000_000) == pytest.approx(0.64 + 70.0 + 8.0)
    assert DEVICE.dense is not None
    assert DEVICE.dense.time_us(1e8, 1e9) == pytest.approx(12 + 70)
    assert DEVICE.dense.time_us(1e8, 1e11) == pytest.approx(12 + 400)
    assert DEVICE.prefill is not None
    assert DEVICE.prefill.time_us(0) == 0
    assert DEVICE.prefill.time_us(1000) == pytest.approx(9.1)
    assert LINK.request.time_us(10_000) == pytest.approx(6.8)
