"""Logits divided into blocks of tokens, so that the best tokens of a large vocabulary are found without sorting it.

Letters: R rows, V vocabulary, N blocks, B tokens per block, K chosen blocks. Block n holds tokens n*B .. n*B + B - 1.

The peak (largest logit) of every block costs one fast pass. The k best tokens of a row lie in its k blocks of highest
peak, as each of those holds a token at least as good as all tokens of the other blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hetis_kernels.logit_peaks import BLOCK, logit_peaks


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some blocks of each row, in token order."""

    logits_RKB: Tensor  # float32; -inf beyond the vocabulary
    first_RK: Tensor  # int64: first token of each block
    left_R: Tensor  # float32: the best logit outside of these blocks; -inf if there is none


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Logits of R rows, and the peak of each block (NaN if a logit is NaN).

    Logits keep the dtype in which they were computed. Only what is looked at closely becomes float32, which is exact.
    """

    size: int
    logits_RNB: Tensor  # any float dtype; -inf beyond the vocabulary
    peak_RN: Tensor  # float32
    is_finite_R: Tensor  # bool: whether all logits are

    @classmethod
    def of(cls, logits_RV: Tensor) -> "Vocabulary":
        """Vocabulary of contiguous `logits_RV`, which are copied only if V is no multiple of B."""
        num_rows, size = logits_RV.shape
        peak_RN, finite_RN = logit_peaks(logits_RV)
        if size % BLOCK:
            logits_RV = torch.nn.functional.pad(logits_RV, (0, -size % BLOCK), value=-torch.inf)
        return cls(size, logits_RV.view(num_rows, -1, BLOCK), peak_RN, finite_RN.all(-1))

    def rows(self, row_I: Tensor) -> "Vocabulary":
        return Vocabulary(self.size, self.logits_RNB[row_I], self.peak_RN[row_I], self.is_finite_R[row_I])

    def best(self) -> Tensor:
        """Largest logits [R]."""
        return self.peak_RN.amax(-1)

    def argmax(self) -> Tensor:
        """Best tokens [R]; the first of equals."""
        block_R = self.peak_RN.argmax(-1)
        row_R = torch.arange(len(block_R), device=block_R.device)
        return block_R * BLOCK + self.logits_RNB[row_R, block_R].argmax(-1)

    def all_blocks(self) -> Blocks:
        num_rows, num_blocks = self.peak_RN.shape
        first_N = torch.arange(0, num_blocks * BLOCK, BLOCK, device=self.peak_RN.device)
        return Blocks(
            self.logits_RNB.float(), first_N.expand(num_rows, -1), self.peak_RN.new_full((num_rows,), -torch.inf)
        )

    def best_blocks(self, num_blocks: int) -> Blocks:
        """The `num_blocks` blocks of highest peak (the first of equals)."""
        num_rows, available = self.peak_RN.shape
        if num_blocks >= available:
            return self.all_blocks()
        chosen_RK = best_columns(self.peak_RN, num_blocks + 1)
        left_R = self.peak_RN.gather(-1, chosen_RK[:, -1:]).squeeze(-1)
        block_RK = chosen_RK[:, :-1].sort(-1).values
        row_R1 = torch.arange(num_rows, device=block_RK.device).unsqueeze(-1)
        return Blocks(self.logits_RNB[row_R1, block_RK].float(), block_RK * BLOCK, left_R)

    def best_tokens(self, count: int) -> Tensor:
        """Ids [R, count] of the best tokens, best first; of equals, the first."""
        blocks = self.best_blocks(count)
        column_RC = best_columns(blocks.logits_RKB.flatten(1), count)
        return blocks.first_RK.gather(-1, column_RC // BLOCK) + column_RC % BLOCK


def best_columns(value_RN: Tensor, count: int) -> Tensor:
    """Columns [R, count] of the largest float32 values, largest first; of equals, the first.

    Ties are ordered because value and column form one key: the bits of floats, with those of negative floats flipped,
    have the order of the floats.
    """
    num_columns = value_RN.shape[1]
    bits_RN = (value_RN + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    bits_RN = bits_RN ^ ((bits_RN >> 31) & 0x7FFFFFFF)
    column_N = torch.arange(num_columns, device=value_RN.device)
    key_RN = (bits_RN.to(torch.int64) << 32) | (num_columns - 1 - column_N)
    few = 8 * count < num_columns
    key_RC = key_RN.topk(count, dim=-1).values if few else sorted_descending(key_RN)[:, :count]
    return num_columns - 1 - (key_RC & 0xFFFFFFFF)


def sorted_descending(value_RN: Tensor) -> Tensor:
    """Values of each row in descending order. On a CPU numpy sorts: 16 rows of 151,936 floats take 6 ms, with torch
    (which also makes indices) 77 ms."""
    if value_RN.device.type != "cpu":
        return value_RN.sort(-1, descending=True).values
    negative_RN = value_RN.neg()
    negative_RN.numpy().sort(axis=-1)
    return negative_RN.neg_()
