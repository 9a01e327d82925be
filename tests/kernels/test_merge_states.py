"""Two partial attentions merged are the attention over all keys."""

import math
from typing import Any

import pytest
import torch

from hetis_kernels.attention import attention_ref
from hetis_kernels.merge_states import merge_states

BACKENDS = ["reference", "triton"]


def merged(device: torch.device, backend: str, *parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out_a, lse2_a, out_b, lse2_b = (part.to(device) for part in parts)
    out, lse2 = torch.empty_like(out_a), torch.empty_like(lse2_a)
    merge_states(out_a, lse2_a, out_b, lse2_b, out, lse2, backend=backend)  # type: ignore[arg-type]
    return out.cpu(), lse2.cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("cut", [1, 20, 37])
def test_a_lane_cut_anywhere_is_the_lane(device: torch.device, backend: str, head_dim: int, cut: int) -> None:
    q, k, v = torch.randn(6, head_dim), torch.randn(38, head_dim), torch.randn(38, head_dim)
    parts: list[Any] = []
    for keys in (slice(0, cut), slice(cut, None)):
        out, lse2 = attention_ref(q, k[keys], v[keys], 0.3)
        parts += [out.view(3, 2, head_dim), lse2.view(3, 2)]
    out, lse2 = merged(device, backend, *parts)
    expected, expected_lse2 = attention_ref(q, k, v, 0.3)
    torch.testing.assert_close(out.view(6, head_dim), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse2.view(6), expected_lse2, rtol=1e-5, atol=1e-5)
    natural = torch.logsumexp(0.3 * q @ k.T, dim=1)
    torch.testing.assert_close(lse2.view(6) * math.log(2), natural, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("swap", [False, True])
def test_an_empty_part_returns_the_other_bit_for_bit(
    device: torch.device, dtype: torch.dtype, backend: str, swap: bool
) -> None:
    out = torch.randn(5, 3, 80).to(dtype)
    lse2 = 40 * torch.randn(5, 3)
    empty, minus_infinity = torch.full_like(out, torch.nan), torch.full_like(lse2, -math.inf)
    parts = (empty, minus_infinity, out, lse2) if swap else (out, lse2, empty, minus_infinity)
    result, result_lse2 = merged(device, backend, *parts)
    assert torch.equal(result, out)
    assert torch.equal(result_lse2, lse2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_empty_parts_are_empty(device: torch.device, backend: str) -> None:
    empty, minus_infinity = torch.full((2, 2, 64), torch.nan), torch.full((2, 2), -math.inf)
    out, lse2 = merged(device, backend, empty, minus_infinity, empty, minus_infinity)
    assert (out == 0).all()
    assert (lse2 == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_parts_neither_overflow_nor_vanish(device: torch.device, backend: str) -> None:
    out_a, out_b = torch.randn(2, 1, 2, 64)
    lse2_a, lse2_b = torch.tensor([[3e4, -3e4]]), torch.tensor([[-3e4, -3e4 + 1]])
    out, lse2 = merged(device, backend, out_a, lse2_a, out_b, lse2_b)
    assert torch.equal(out[0, 0], out_a[0, 0])
    torch.testing.assert_close(out[0, 1], (out_a[0, 1] + 2 * out_b[0, 1]) / 3)
    torch.testing.assert_close(lse2, torch.tensor([[3e4, -3e4 + math.log2(3)]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_may_replace_a_part(device: torch.device, backend: str) -> None:
    out_a, out_b = torch.randn(2, 9, 2, 64).unbind(0)
    lse2_a, lse2_b = torch.randn(2, 9, 2).unbind(0)
    expected = merged(device, backend, out_a, lse2_a, out_b, lse2_b)
    out_a, lse2_a, out_b, lse2_b = (x.to(device) for x in (out_a, lse2_a, out_b, lse2_b))
    merge_states(out_a, lse2_a, out_b, lse2_b, out_a, lse2_a, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(out_a.cpu(), expected[0])
    assert torch.equal(lse2_a.cpu(), expected[1])


def test_arguments_are_checked() -> None:
    out, lse2 = torch.zeros(2, 3, 64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="lse2_b_NM has shape"):
        merge_states(out, lse2, out, lse2[:1], out, lse2)
    with pytest.raises(ValueError, match="contiguous tensors only"):
        merge_states(out, lse2, out, lse2, torch.zeros(2, 3, 128)[..., :64], lse2)
