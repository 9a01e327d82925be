"""Query and key norm (where the model has one) and rotary positions, in place on fused qkv.

T tokens, G head groups, M query heads per group, H = M + 2 heads of a group (queries, key, value), D head_dim,
P positions of the table, R rotary dimensions.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .dispatch import Backend, check_floats, check_indices, check_shape, select


def qk_norm_rope_ref(
    qkv_TGHD: torch.Tensor,
    num_queries: int,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    epsilon: float,
    cos_sin_PR: torch.Tensor | None,
    position_T: torch.Tensor,
) -> None:
    """The formula of `qk_norm_rope`: norm as LlamaRMSNorm rounds, then the rotation in float32."""
    _check(qkv_TGHD, num_queries, q_weight_D, k_weight_D, cos_sin_PR, position_T)
    qk_TGHD = qkv_TGHD[:, :, : num_queries + 1]
    if q_weight_D is not None and k_weight_D is not None:
        x = qk_TGHD.float()
        normalised = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)).to(qkv_TGHD.dtype)
        qk_TGHD[:, :, :num_queries] = q_weight_D * normalised[:, :, :num_queries]
        qk_TGHD[:, :, num_queries] = k_weight_D * normalised[:, :, num_queries]
    if cos_sin_PR is not None:
        half = cos_sin_PR.shape[1] // 2
        cos_T11F, sin_T11F = cos_sin_PR[position_T][:, None, None].chunk(2, dim=-1)
        x1, x2 = qk_TGHD[..., : 2 * half].float().chunk(2, dim=-1)
        rotated = torch.cat((x1 * cos_T11F - x2 * sin_T11F, x2 * cos_T11F + x1 * sin_T11F), dim=-1)
        qk_TGHD[..., : 2 * half] = rotated.to(qkv_TGHD.dtype)


def qk_norm_rope(
    qkv_TGHD: torch.Tensor,
    num_queries: int,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    epsilon: float,
    cos_sin_PR: torch.Tensor | None,
    position_T: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """Normalises and rotates queries and keys in place; values are not touched.

    Norm (both weights or neither): x / sqrt(mean(x^2) + epsilon) over D in float32, rounded to the dtype, times the
    weight in the dtype. Rotation (when cos_sin_PR is given) of the first R values, halves (x1, x2), in float32 with one
    rounding at the end: (x1 cos - x2 sin, x2 cos + x1 sin).

    qkv_TGHD: [T, G, M + 2, D] contiguous. cos_sin_PR: float32 [positions, R], R/2 cosines then R/2 sines. position_T:
    int64. Raises ValueError for wrong shapes, dtypes or devices.
    """
    run = select("qk_norm_rope", backend, qkv_TGHD.device, qk_norm_rope_ref, _launch)
    run(qkv_TGHD, num_queries, q_weight_D, k_weight_D, epsilon, cos_sin_PR, position_T)


def _check(
    qkv_TGHD: torch.Tensor,
    num_queries: int,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    cos_sin_PR: torch.Tensor | None,
    position_T: torch.Tensor,
) -> None:
    num_tokens, num_groups, _, head_dim = qkv_TGHD.shape
    check_floats(qkv_TGHD=qkv_TGHD)
    check_indices(torch.int64, qkv_TGHD.device, position_T=position_T)
    check_shape("position_T", position_T, num_tokens)
    check_shape("qkv_TGHD", qkv_TGHD, num_tokens, num_groups, num_queries + 2, head_dim)
    if not qkv_TGHD.is_contiguous():
        raise ValueError("qkv_TGHD is not contiguous; pass the whole output of the QKV projection")
    if (q_weight_D is None) != (k_weight_D is None):
        raise ValueError("only one of q_weight_D and k_weight_D is given; give both or neither")
    if q_weight_D is not None and k_weight_D is not None:
        check_floats(qkv_TGHD=qkv_TGHD, q_weight_D=q_weight_D, k_weight_D=k_weight_D)
        check_shape("q_weight_D", q_weight_D, head_dim)
        check_shape("k_weight_D", k_weight_D, head_dim)
    if cos_sin_PR is not None:
        check_floats(cos_sin_PR=cos_sin_PR)
        if cos_sin_PR.dtype != torch.float32 or cos_sin_PR.shape[1] % 2 or cos_sin_PR.shape[1] > head_dim:
            raise ValueError(
                f"cos_sin_PR is {cos_sin_PR.dtype} {tuple(cos_sin_PR.shape)}; "
                f"it must be float32 with an even number of columns up to {head_dim}"
            )


@triton.jit
@no_type_check
def _qk_norm_rope_kernel(
    qkv_pointer,
    q_weight_pointer,
    k_weight_pointer,
    cos_sin_pointer,
    position_pointer,
    epsilon,
    NUM_QUERIES: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    group = t * tl.num_programs(1) + tl.program_id(1)
    dtype = qkv_pointer.dtype.element_ty
    head = tl.arange(0, BLOCK_H)[:, None]
    half = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_half = (head <= NUM_QUERIES) & (half < HALF)
    in_rest = (head <= NUM_QUERIES) & (rest < D)
    base = qkv_pointer + (group * (NUM_QUERIES + 2) + head) * D
    x1 = tl.load(base + half, mask=in_half, other=0.0).to(tl.float32)
    x2 = tl.load(base + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    if q_weight_pointer is not None:
        x3 = tl.load(base + rest, mask=in_rest, other=0.0).to(tl.float32)
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
        inverse = tl.rsqrt(squares / D + epsilon)[:, None]
        # the queries share one weight, the key has another
        weight = tl.where(head == NUM_QUERIES, k_weight_pointer, q_weight_pointer)
        w1 = tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32)
        w2 = tl.load(weight + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        w3 = tl.load(weight + rest, mask=in_rest, other=0.0).to(tl.float32)
        x1 = (w1 * (x1 * inverse).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        x2 = (w2 * (x2 * inverse).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        x3 = w3 * (x3 * inverse).to(dtype).to(tl.float32)
        tl.store(base + rest, x3.to(dtype), mask=in_rest)
    if cos_sin_pointer is not None:
        angle = cos_sin_pointer + tl.load(position_pointer + t) * (2 * HALF) + half
        cos = tl.load(angle, mask=half < HALF, other=0.0)
        sin = tl.load(angle + HALF, mask=half < HALF, other=0.0)
        x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    tl.store(base + half, x1.to(dtype), mask=in_half)
    tl.store(base + HALF + half, x2.to(dtype), mask=in_half)


def _launch(
    qkv_TGHD: torch.Tensor,
    num_queries: int,
    q_weight_D: torch.Tensor | None,
    k_weight_D: torch.Tensor | None,
    epsilon: float,
    cos_sin_PR: torch.Tensor | None,
    position_T: torch.Tensor,
) -> None:
    _check(qkv_TGHD, num_queries, q_weight_D, k_weight_D, cos_sin_PR, position_T)
    num_tokens, num_groups, _, head_dim = qkv_TGHD.shape
    if qkv_TGHD.numel() == 0 or (q_weight_D is None and cos_sin_PR is None):
        return
    half = (head_dim if cos_sin_PR is None else cos_sin_PR.shape[1]) // 2
    _qk_norm_rope_kernel[(num_tokens, num_groups)](
        qkv_TGHD,
        q_weight_D,
        k_weight_D,
        cos_sin_PR,
        position_T,
        epsilon,
        NUM_QUERIES=num_queries,
        D=head_dim,
        HALF=half,
        BLOCK_H=triton.next_power_of_2(num_queries + 1),
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, head_dim - 2 * half)),
        enable_fp_fusion=True,
    )
