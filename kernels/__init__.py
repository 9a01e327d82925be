"""Kernels of hetis: each file holds a plain torch reference, a Triton kernel and the launcher that selects by device.

They see tensors of lanes, tokens and pages, and nothing of requests, models or ranks.
"""

from .flash_prefill import flash_prefill
from .gated_activation import gated_activation, gated_activation_ref
from .kv_append import kv_append, kv_append_ref
from .lane_pack import lane_pack, lane_pack_ref, lane_unpack, lane_unpack_ref
from .page_copy import page_gather, page_gather_ref, page_scatter, page_scatter_ref
from .paged_decode import paged_decode, paged_decode_ref
from .rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .rope import qk_norm_rope, qk_norm_rope_ref
from .varlen_prefill import paged_prefill, paged_prefill_ref

__all__ = [
    "add_rms_norm",
    "add_rms_norm_ref",
    "flash_prefill",
    "gated_activation",
    "gated_activation_ref",
    "kv_append",
    "kv_append_ref",
    "lane_pack",
    "lane_pack_ref",
    "lane_unpack",
    "lane_unpack_ref",
    "page_gather",
    "page_gather_ref",
    "page_scatter",
    "page_scatter_ref",
    "paged_decode",
    "paged_decode_ref",
    "paged_prefill",
    "paged_prefill_ref",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "rms_norm",
    "rms_norm_ref",
]
