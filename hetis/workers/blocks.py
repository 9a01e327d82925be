"""Logits cut into blocks of tokens, so that the best tokens of a large vocabulary are found without sorting it.

Letters: R rows, V vocabulary, N blocks, B tokens per block, K chosen blocks. Block n holds tokens n*B .. n*B + B - 1.

The peak (largest logit) of every block is one fast pass. The k best tokens of a row lie in the k blocks of highest peak:
each of these has a token at least as good as every token of the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # B


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some or all blocks of some rows. Blocks are in order of token ids, so tokens are too."""

    logits_RKB: Tensor  # float32; -inf beyond the vocabulary
    first_RK: Tensor  # int64: the first token id of each block
    left_R: Tensor  # float32: the best logit that is not in these blocks, -inf when all blocks are

    @property
    def flat_RN(self) -> Tensor:
        return self.logits_RKB.flatten(1)


class Vocabulary:
    """All blocks of R rows, with their peaks."""

    def __init__(self, logits_RV: Tensor) -> None:
        """`logits_RV` float32, contiguous; not copied unless its width has to be padded."""
        num_rows, self.size = logits_RV.shape
        padding = -self.size % BLOCK
        if padding:
            logits_RV = torch.nn.functional.pad(logits_RV, (0, padding), value=-torch.inf)
        self.logits_RNB = logits_RV.view(num_rows, -1, BLOCK)
        self.peak_RN = self.logits_RNB.amax(-1)  # NaN if there is one
        self.best_R = self.peak_RN.amax(-1)

    @classmethod
    def _of(cls, logits_RNB: Tensor, peak_RN: Tensor, size: int) -> "Vocabulary":
        found = cls.__new__(cls)
        found.size, found.logits_RNB, found.peak_RN, found.best_R = size, logits_RNB, peak_RN, peak_RN.amax(-1)
        return found

    def rows(self, row_I: Tensor) -> "Vocabulary":
        return self._of(self.logits_RNB[row_I], self.peak_RN[row_I], self.size)

    def argmax(self) -> Tensor:
        """The best token [R], the first of equals."""
        block_R = self.peak_RN.argmax(-1)
        return block_R * BLOCK + _pick(self.logits_RNB, block_R).argmax(-1)
