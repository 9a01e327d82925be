"""Query and key norm and rotary positions on fused QKV vectors, against transformers' own functions."""

import pytest
import torch

from hetis_kernels.rope import qk_norm_rope

BACKENDS = ["reference", "triton"]


def rotary_table(num_positions: int, rotary_dim: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(num_positions)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("head_dim", "num_queries"), [(64, 1), (80, 3), (128, 4), (32, 8)])
def test_it_is_norm_and_rotation_of_transformers(
    device: torch.device, backend: str, normed: bool, head_dim: int, num_queries: int
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    num_tokens, num_groups = 5, 2
    qkv = torch.randn(num_tokens, num_groups, num_queries + 2, head_dim)
    position = torch.randint(0, 50, (num_tokens,))
    table = rotary_table(50, head_dim)
    norms = [LlamaRMSNorm(head_dim, eps=1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    q, k = qkv[:, :, :num_queries].clone(), qkv[:, :, num_queries : num_queries + 1].clone()
    if normed:
        with torch.no_grad():
            q, k = norms[0](q), norms[1](k)
    cos, sin = (half.repeat(1, 2)[None] for half in table[position].chunk(2, dim=1))
    heads_first = [x.flatten(1, 2).transpose(0, 1)[None] for x in (q, k)]
    q_rotated, k_rotated = apply_rotary_pos_emb(*heads_first, cos, sin)
    expected = qkv.clone()
    expected[:, :, :num_queries] = q_rotated[0].transpose(0, 1).view(q.shape)
    expected[:, :, num_queries] = k_rotated[0].transpose(0, 1).view(k[:, :, 0].shape)

    weights = [norm.weight.data.to(device) if normed else None for norm in norms]
    result = qkv.to(device)
    qk_norm_rope(result, num_queries, *weights, 1e-6, table.to(device), position.to(device), backend=backend)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotary_dim", [None, 16, 32, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_kernel_is_reference_for_partial_rotation(
    device: torch.device, dtype: torch.dtype, rotary_dim: int | None, normed: bool
) -> None:
    qkv = torch.randn(4, 3, 5, 80).to(dtype).to(device)
    table = None if rotary_dim is None else rotary_table(30, rotary_dim).to(device)
    weights = torch.randn(2, 80).to(dtype).to(device).unbind(0) if normed else (None, None)
    position = torch.tensor([29, 0, 3, 3], device=device)
    result, expected = qkv.clone(), qkv.clone()
    qk_norm_rope(result, 3, *weights, 1e-6, table, position, backend="triton")
    qk_norm_rope(expected, 3, *weights, 1e-6, table, position, backend="reference")
    # the norm rounds twice before the rotation: up to three units in the last place of bfloat16
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(result[:, :, 4], qkv[:, :, 4])
    if rotary_dim is None and not normed:
        assert torch.equal(result, qkv)


def test_arguments_are_checked() -> None:
    qkv, position, weight = torch.zeros(2, 1, 4, 64), torch.zeros(2).long(), torch.zeros(64)
    with pytest.raises(ValueError, match="give both or neither"):
        qk_norm_rope(qkv, 2, weight, None, 1e-6, None, position, backend="reference")
    with pytest.raises(ValueError, match="even number of columns up to 64"):
        qk_norm_rope(qkv, 2, None, None, 1e-6, torch.zeros(3, 80), position, backend="reference")
    with pytest.raises(ValueError, match="qkv_TGHD has shape"):
        qk_norm_rope(qkv, 3, None, None, 1e-6, None, position, backend="reference")
    with pytest.raises(ValueError, match="not contiguous"):
        qk_norm_rope(torch.zeros(2, 1, 4, 128)[..., :64], 2, weight, weight, 1e-6, None, position, backend="reference")
