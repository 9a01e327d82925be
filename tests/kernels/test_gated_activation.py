"""The gate of a gated MLP, against the activations of transformers."""

import pytest
import torch

from hetis_kernels.gated_activation import gated_activation

NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("activation", list(NAMES))
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(3, 100), (1, 1030)])
def test_it_is_the_activation_of_transformers(
    device: torch.device,
    dtype: torch.dtype,
    tolerance: dict[str, float],
    backend: str,
    activation: str,
    num_tokens: int,
    num_columns: int,
) -> None:
    from transformers.activations import ACT2FN

    gate_up = 3 * torch.randn(num_tokens, 2 * num_columns)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    gate_up = gate_up.to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    expected = ACT2FN[NAMES[activation]](gate) * up
    out = torch.empty(num_tokens, num_columns, dtype=dtype, device=device)
    gated_activation(gate_up.to(device), activation, out, backend=backend)
    torch.testing.assert_close(out.cpu(), expected, **tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton", "auto"])
def test_without_columns_nothing_is_launched(device: torch.device, backend: str) -> None:
    gated_activation(torch.zeros(3, 0, device=device), "silu", torch.zeros(3, 0, device=device), backend=backend)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        gated_activation(torch.zeros(2, 8), "swish", torch.zeros(2, 4), backend="reference")
    with pytest.raises(ValueError, match="gate_up_TF2 has shape"):
        gated_activation(torch.zeros(2, 8), "silu", torch.zeros(2, 8), backend="reference")
