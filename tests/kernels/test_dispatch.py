"""Which implementation a launcher picks."""

import pytest
import torch

import hetis_kernels
from hetis_kernels.dispatch import select


def picked(backend: str, device: str) -> str:
    calls: list[str] = []
    arguments = ("no_such_operation", backend, torch.device(device))
    select(*arguments, lambda: calls.append("reference"), lambda: calls.append("triton"))()  # type: ignore[arg-type]
    return calls[0]


def test_auto_selects_by_device_and_names_force_one() -> None:
    assert picked("auto", "cpu") == "reference"
    assert picked("triton", "cpu") == "triton"
    assert picked("reference", "cpu") == "reference"


def test_a_missing_extension_and_a_wrong_name_are_refused() -> None:
    with pytest.raises(ValueError, match="not in the C\\+\\+ extension"):
        picked("cpu", "cpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        picked("gpu", "cpu")


def test_every_public_name_exists() -> None:
    for name in hetis_kernels.__all__:
        assert callable(getattr(hetis_kernels, name))
        assert getattr(hetis_kernels, name).__doc__
