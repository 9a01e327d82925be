"""What there is to be compared, and how a kernel of attention is compared with its formula."""

from typing import Any, Protocol

import torch

KERNELS = {
    "paged_decode": ["_paged_decode_kernel", "_merge_splits_kernel"],
    "varlen_prefill": ["_paged_prefill_kernel"],
    "kv_append": ["_kv_append_kernel"],
    "lane_pack": ["_lane_pack_kernel"],
    "page_copy": ["_page_copy_kernel"],
    "rms_norm": ["_rms_norm_kernel"],
    "rope": ["_qk_norm_rope_kernel"],
    "gated_activation": ["_gated_activation_kernel"],
}


class Problem(Protocol):
    def run(self, device: torch.device, window: int, backend: str, **options: Any) -> torch.Tensor: ...


def check(problem: Problem, device: torch.device, window: int, tolerance: dict[str, float], **options: Any) -> None:
    """The Triton kernel on `device` gives what the reference gives on the CPU."""
    out = problem.run(device, window, backend="triton", **options)
    torch.testing.assert_close(out, problem.run(torch.device("cpu"), window, backend="reference"), **tolerance)
