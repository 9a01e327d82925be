"""One small launch of every kernel that uses shared memory, for compute-sanitizer.

    compute-sanitizer --tool racecheck --error-exitcode 1 python bench/gpu/sanitized.py

Tensors are created on the CPU, so that no kernels of torch (sorting, for example) are checked.
"""

import torch

import hetis_kernels as hk

LENGTHS = (600, 1, 33)  # the first is split
GROUPS, QUERIES, HEAD_DIM, PAGE = 2, 4, 64, 16
TOKENS = 70  # of a prompt


def main() -> None:
    lanes, width = len(LENGTHS) * GROUPS, -(-max(LENGTHS) // PAGE)
    pool = random(2, lanes * width, PAGE, HEAD_DIM)
    table = torch.randperm(lanes * width).int().view(lanes, width)
    cells, table = (table[:, 0].long() * PAGE).cuda(), table.cuda()
    qkv, out = random(lanes, QUERIES + 2, HEAD_DIM), random(lanes, QUERIES, HEAD_DIM)
    order = torch.arange(lanes).int().cuda()
    length = torch.tensor(LENGTHS).int().repeat_interleave(GROUPS).cuda()
    hk.kv_append(qkv[:, QUERIES], qkv[:, QUERIES + 1], pool, order, cells)
    hk.paged_decode(qkv[:, :QUERIES], pool, table, order, order, length, 0.125, 0, out)
    prompt = random(TOKENS, GROUPS, QUERIES + 2, HEAD_DIM)
    attended = random(TOKENS, GROUPS, QUERIES, HEAD_DIM)
    start, context = torch.tensor([0, TOKENS]).int().cuda(), torch.tensor([TOKENS + 5]).int().cuda()
    lane = order[None, :GROUPS]
    hk.paged_prefill(prompt[:, :, :QUERIES], pool, table, start, lane, context, 0.125, 0, attended)
    hk.lane_pack(qkv.flatten(1), order, random(lanes, (QUERIES + 2) * HEAD_DIM))
    hk.add_rms_norm(random(9, 512), random(9, 512), random(512), 1e-6, random(9, 512))
    torch.cuda.synchronize()
    assert bool(out.cpu().isfinite().all())
    assert bool(attended.cpu().isfinite().all())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16().cuda()


if __name__ == "__main__":
    main()
