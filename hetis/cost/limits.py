"""Bounds of a step and of a sequence, from which the sizes of all buffers follow."""

import msgspec

from hetis.core.model_spec import DTYPE_BYTES


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    dtype: str  # of weights, activations, KV pages and messages
    block_size: int  # tokens per page
    max_num_batched_tokens: int  # of a step
    max_num_seqs: int  # that run at the same time
    max_model_len: int  # tokens of a sequence

    @property
    def value_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def max_num_decodes(self) -> int:
        """Most decode tokens of a step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)
