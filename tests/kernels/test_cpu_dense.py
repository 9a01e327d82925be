"""The C++ norms, rotary positions and activations against their references, on every instruction set that is here."""

from collections.abc import Iterator

import pytest
import torch

from hetis_kernels.gated_activation import gated_activation
from hetis_kernels.rms_norm import add_rms_norm, rms_norm
from hetis_kernels.rope import qk_norm_rope

# float32 sums in another order; one unit in the last place where such a sum decides a rounding
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HIDDEN = [1, 7, 16, 37, 64, 100, 1024]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"], autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Limits the kernels to one instruction set that this machine has."""
    if torch.ops.hetis.limit_dense_isa(request.param) != request.param:
        pytest.skip(f"no {request.param} here")
    yield request.param
    torch.ops.hetis.limit_dense_isa("avx512_bf16")


@pytest.fixture
def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}


def strided(num_tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that do not follow each other, of values of many sizes."""
    return (torch.randn(num_tokens, columns + 3) * 10.0 ** torch.randn(num_tokens, 1)).to(dtype)[:, 1 : columns + 1]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_rms_norm(dtype: torch.dtype, close: dict[str, float], hidden: int) -> None:
    x, weight = strided(5, hidden, dtype), torch.randn(hidden).to(dtype)
    whole = torch.full((5, hidden + 2), torch.nan, dtype=dtype)
    out, expected = whole[:, :hidden], torch.empty(5, hidden, dtype=dtype)
    rms_norm(x, weight, 1e-5, expected, backend="reference")
    rms_norm(x, weight, 1e-5, out, backend="cpu")
    torch.testing.assert_close(out, expected, **close)
    assert whole[:, hidden:].isnan().all()


@pytest.mark.parametrize("hidden", HIDDEN)
def test_add_rms_norm_in_place(dtype: torch.dtype, close: dict[str, float], hidden: int) -> None:
    x, residual, weight = strided(4, hidden, dtype), strided(4, hidden, dtype), torch.randn(hidden).to(dtype)
    total, expected = residual.clone(), torch.empty(4, hidden, dtype=dtype)
    add_rms_norm(x, total, weight, 1e-6, expected, backend="reference")
    add_rms_norm(x, residual, weight, 1e-6, x, backend="cpu")
    assert torch.equal(residual, total)
    torch.testing.assert_close(x, expected, **close)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 80), (128, 64), (32, 20), (256, 256), (16, 0)])
@pytest.mark.parametrize("normed", [False, True])
def test_qk_norm_rope(
    dtype: torch.dtype, close: dict[str, float], head_dim: int, rotary_dim: int, normed: bool
) -> None:
    for num_groups, num_queries in ((1, 8), (3, 1), (2, 4)):
        qkv = torch.randn(5, num_groups, num_queries + 2, head_dim).to(dtype)
        weights = torch.randn(2, head_dim).to(dtype).unbind(0) if normed else (None, None)
        angle = torch.rand(40, rotary_dim // 2) * 6
        table = torch.cat((angle.cos(), angle.sin()), dim=1) if rotary_dim else None
        position = torch.tensor([39, 0, 7, 7, 1])
        result, expected = qkv.clone(), qkv.clone()
        qk_norm_rope(result, num_queries, *weights, 1e-6, table, position, backend="cpu")
        qk_norm_rope(expected, num_queries, *weights, 1e-6, table, position, backend="reference")
        # a rounding of the norm that falls the other way is turned into both halves
        torch.testing.assert_close(result, expected, rtol=close["rtol"], atol=4 * close["atol"])
        assert torch.equal(result[:, :, -1], qkv[:, :, -1])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("columns", [1, 15, 16, 100, 3072])
def test_gated_activation(dtype: torch.dtype, close: dict[str, float], activation: str, columns: int) -> None:
    gate_up = (3 * torch.randn(3, 2 * columns + 1)).to(dtype)[:, 1:]
    extremes = torch.tensor([-200.0, -88.5, -0.0, 0.0, 88.5, 200.0, torch.nan]).to(dtype)[:columns]
    gate_up[0, : extremes.numel()] = extremes
    out, expected = torch.empty(2, 3, columns, dtype=dtype).unbind(0)
    gated_activation(gate_up, activation, out, backend="cpu")
    gated_activation(gate_up, activation, expected, backend="reference")
    # torch's vectorised erf misses by 1e-6, and the other factor is up to 12
    atol = max(close["atol"], 2e-5) if activation == "gelu" else close["atol"]
    torch.testing.assert_close(out, expected, rtol=close["rtol"], atol=atol, equal_nan=True)


def test_a_token_alone_is_the_token_in_a_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(70, 1000).to(dtype), torch.randn(1000).to(dtype)
    normed, gated = torch.empty_like(x), torch.empty(70, 500, dtype=dtype)
    rms_norm(x, weight, 1e-6, normed, backend="cpu")
    gated_activation(x, "silu", gated, backend="cpu")
    for t in (0, 33, 69):
        alone, gate_alone = torch.empty(1, 1000, dtype=dtype), torch.empty(1, 500, dtype=dtype)
        rms_norm(x[t : t + 1], weight, 1e-6, alone, backend="cpu")
        gated_activation(x[t : t + 1], "silu", gate_alone, backend="cpu")
        assert torch.equal(alone[0], normed[t])
        assert torch.equal(gate_alone[0], gated[t])


def test_operations_check_what_they_would_read() -> None:
    ops, x = torch.ops.hetis, torch.zeros(2, 8)
    with pytest.raises(ValueError, match="the weight \\[H\\]"):
        ops.rms_norm(x, torch.zeros(7), 1e-6, x)
    with pytest.raises(ValueError, match="residual must be"):
        ops.add_rms_norm(x, x.half(), torch.zeros(8), 1e-6, x)
    with pytest.raises(ValueError, match="dtype Long is not supported"):
        ops.rms_norm(x.long(), torch.zeros(8).long(), 1e-6, x.long())
    with pytest.raises(ValueError, match=r"\[T, 2 F\]"):
        ops.gated_activation(x, "silu", x)
    with pytest.raises(ValueError, match="unknown activation swish"):
        ops.gated_activation(x, "swish", torch.zeros(2, 4))
    qkv, table = torch.zeros(2, 1, 3, 16), torch.zeros(5, 16)
    with pytest.raises(IndexError, match="outside the table of 5"):
        ops.qk_norm_rope(qkv, 1, None, None, 1e-6, table, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="both the query and the key weight"):
        ops.qk_norm_rope(qkv, 1, torch.zeros(16), None, 1e-6, table, torch.tensor([0, 4]))
