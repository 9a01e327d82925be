"""Sums of integer weights against a loop."""

import pytest
import torch

from hetis_kernels.weight_mass import weight_mass


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 7, 64), (2, 500, 64), (0, 3, 64), (2, 0, 64)])
def test_every_weight_is_cut_before_it_is_added(
    device: torch.device, backend: str, shape: tuple[int, int, int]
) -> None:
    weight = torch.exp2(torch.rand(shape) * 44 - 4).clamp(max=2.0**40)
    weight.view(-1)[::5] = 0.0
    weight.view(-1)[1::7] = 2.0**40
    found = weight_mass(weight.to(device), backend=backend)
    assert found.dtype == torch.int64
    assert found.tolist() == [[sum(map(int, block)) for block in row] for row in weight.tolist()]


def test_other_weights_are_refused(device: torch.device) -> None:
    if device.type == "cpu":
        with pytest.raises(ValueError, match="contiguous float32"):
            weight_mass(torch.zeros(2, 3, 64, dtype=torch.float64))
