"""One small launch of every kernel that shares memory between threads, for compute-sanitizer.

compute-sanitizer --tool racecheck --error-exitcode 1 python bench/gpu/sanitized.py
"""

import torch

import hetis_kernels as hk

LENGTHS = (600, 1, 33)  # the first is split
GROUPS, QUERIES, HEAD_DIM, PAGE = 2, 4, 64, 16


def main() -> None:
    torch.set_default_device("cuda")
    lanes, width = len(LENGTHS) * GROUPS, -(-max(LENGTHS) // PAGE)
    pool = torch.randn(2, lanes * width, PAGE, HEAD_DIM, dtype=torch.bfloat16)
    table = torch.randperm(lanes * width).int().view(lanes, width)
    qkv = torch.randn(lanes, QUERIES + 2, HEAD_DIM, dtype=torch.bfloat16)
    order = torch.arange(lanes).int()
    length = torch.tensor(LENGTHS).int().repeat_interleave(GROUPS)
    out = torch.empty(lanes, QUERIES, HEAD_DIM, dtype=torch.bfloat16)
    lse2 = torch.empty(lanes, QUERIES)
    slots = table[:, 0].long() * PAGE
    hk.kv_append(qkv[:, QUERIES], qkv[:, QUERIES + 1], pool, order, slots)
    hk.paged_decode(qkv[:, :QUERIES], pool, table, order, order, length, 0.125, 0, out, lse2)
    tokens = 70
    rows = torch.randn(tokens, GROUPS, QUERIES + 2, HEAD_DIM, dtype=torch.bfloat16)
    attended, scores = torch.empty_like(rows[:, :, :QUERIES]).contiguous(), torch.empty(tokens, GROUPS, QUERIES)
    start, context = torch.tensor([0, tokens]).int(), torch.tensor([tokens + 5]).int()
    hk.paged_prefill(
        rows[:, :, :QUERIES], pool, table, start, order[None, :GROUPS], context, 0.125, 0, attended, scores
    )
    packed = torch.empty(lanes, (QUERIES + 2) * HEAD_DIM, dtype=torch.bfloat16)
    hk.lane_pack(qkv.flatten(1), order, packed)
    weight, residual = torch.ones(512, dtype=torch.bfloat16), torch.randn(9, 512, dtype=torch.bfloat16)
    hk.add_rms_norm(torch.randn_like(residual), residual, weight, 1e-6, torch.empty_like(residual))
    torch.cuda.synchronize()
    assert out.isfinite().all()
    assert attended.isfinite().all()


if __name__ == "__main__":
    main()
