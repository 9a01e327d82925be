"""Best tokens and blocks of a vocabulary against a sort of the whole vocabulary."""

import pytest
import torch

from hetis.ranks.sampling.vocabulary import Vocabulary
from tests.ranks.sampling.slow_sampler import random_logits


@pytest.mark.parametrize("count", [1, 7, 64, 100, 640])
def test_best_tokens_equal_a_stable_sort(count: int, device: str) -> None:
    logits = random_logits(3, 640).mul(3).round().to(device)
    logits[0, ::7] = -0.0
    logits[2, 5:600] = -torch.inf
    found = Vocabulary.of(logits).best_tokens(count)
    assert torch.equal(found, logits.sort(dim=-1, descending=True, stable=True).indices[:, :count])


def test_best_blocks_hold_all_tokens_above_the_best_one_outside(device: str) -> None:
    logits = random_logits(4, 1000).to(device)
    for num_blocks in (1, 3, 15, 16, 99):
        blocks = Vocabulary.of(logits).best_blocks(num_blocks)
        assert (blocks.first_RK.diff() > 0).all()
        for row in range(4):
            held = set(blocks.logits_RKB[row].flatten().tolist()) - {-torch.inf}
            rest = set(logits[row].tolist()) - held
            assert max(rest, default=-torch.inf) == blocks.left_R[row]
            assert len(held) + len(rest) == 1000
