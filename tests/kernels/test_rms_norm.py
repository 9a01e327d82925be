"""Root-mean-square norm, against transformers' own layer."""

import pytest
import torch

from hetis_kernels.rms_norm import add_rms_norm, rms_norm

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (5, 100), (3, 1024), (2, 5120)])
def test_it_is_the_layer_of_transformers(
    device: torch.device,
    dtype: torch.dtype,
    tolerance: dict[str, float],
    backend: str,
    num_tokens: int,
    hidden: int,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = LlamaRMSNorm(hidden, eps=1e-5).to(dtype)
    layer.weight.data.normal_()
    x_TH = torch.randn(num_tokens, 2 * hidden).to(dtype)[:, :hidden]
    with torch.no_grad():
        expected = layer(x_TH)
    x_TH, weight_H = x_TH.to(device), layer.weight.data.to(device)
    out_TH = torch.empty(num_tokens, hidden, dtype=dtype, device=device)
    rms_norm(x_TH, weight_H, 1e-5, out_TH, backend=backend)
    torch.testing.assert_close(out_TH.cpu(), expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_first_is_adding_and_then_norming(
    device: torch.device, dtype: torch.dtype, tolerance: dict[str, float], backend: str
) -> None:
    x_TH, residual_TH = torch.randn(2, 7, 300).to(dtype).to(device)
    weight_H = torch.randn(300).to(dtype).to(device)
    total_TH, expected = residual_TH + x_TH, torch.empty_like(x_TH)
    rms_norm(total_TH, weight_H, 1e-6, expected, backend=backend)
    add_rms_norm(x_TH, residual_TH, weight_H, 1e-6, x_TH, backend=backend)  # the output may be x itself
    torch.testing.assert_close(residual_TH, total_TH, **tolerance)
    torch.testing.assert_close(x_TH, expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_alone_is_the_token_in_a_batch(device: torch.device, dtype: torch.dtype, backend: str) -> None:
    x_TH, weight_H = torch.randn(9, 200).to(dtype).to(device), torch.randn(200).to(dtype).to(device)
    out_TH, alone = torch.empty_like(x_TH), torch.empty_like(x_TH)
    rms_norm(x_TH, weight_H, 1e-6, out_TH, backend=backend)
    for t in range(9):
        rms_norm(x_TH[t : t + 1], weight_H, 1e-6, alone[t : t + 1], backend=backend)
    assert torch.equal(alone, out_TH)


def test_arguments_are_checked() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="weight_H has shape"):
        rms_norm(x, torch.zeros(9), 1e-5, x, backend="reference")
    with pytest.raises(ValueError, match=r"residual_TH is torch\.float16"):
        add_rms_norm(x, x.half(), torch.zeros(8), 1e-5, x, backend="reference")
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        rms_norm(x.long(), torch.zeros(8), 1e-5, x, backend="reference")
