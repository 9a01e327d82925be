"""Log-probabilities of given tokens and of the best tokens, from raw logits.

Letters as in `vocabulary`; N positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hetis.core.token_logprobs import TokenLogprobs
from hetis.ranks.sampling.vocabulary import Vocabulary

LOGITS_AT_ONCE = 1 << 20  # bounds float32 logits and temporaries (4 MiB each), so that caches hold them
RAW_LOGPROBS, RAW_LOGITS = "raw_logprobs", "raw_logits"
WHOLE_VOCABULARY = -1


def prompt_logprobs(
    logits_NV: Tensor, token_N: np.ndarray, count: int, mode: str = RAW_LOGPROBS
) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt's next token and of the `count` best tokens (-1: all), at each position."""
    return token_logprobs(logits_NV, torch.from_numpy(token_N.astype(np.int64)), [count] * len(token_N), mode)


def token_logprobs(
    logits_NV: Tensor, token_N: Tensor, counts: Sequence[int], mode: str = RAW_LOGPROBS
) -> list[TokenLogprobs]:
    """Log-probabilities of the given token and of the `counts[n]` best tokens (-1: all), for each row of logits.

    Values are log-softmax in float32, or the logits themselves when `mode` is "raw_logits".
    """
    vocab_size = logits_NV.shape[1]
    wanted = [vocab_size if count == WHOLE_VOCABULARY else min(count, vocab_size) for count in counts]
    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    found: list[TokenLogprobs] = []
    for start in range(0, len(wanted), at_once):
        part = slice(start, start + at_once)
        found += _score(logits_NV[part].float().contiguous(), token_N[part].to(logits_NV.device), wanted[part], mode)
    return found


def _score(logits_NV: Tensor, token_N: Tensor, wanted: list[int], mode: str) -> list[TokenLogprobs]:
    vocabulary = Vocabulary.of(logits_NV)
    token_N1 = token_N.unsqueeze(-1)
    id_NC = torch.cat([token_N1, vocabulary.best_tokens(max(wanted))], dim=-1) if max(wanted) else token_N1
    value_NC = logits_NV.gather(-1, id_NC)
    scratch_NV = torch.empty_like(logits_NV)
    # counted as floats (exact below 2^24), which on CPU is several times faster than as bools
    rank_N = torch.gt(logits_NV, value_NC[:, :1], out=scratch_NV).sum(-1).long() + 1
    if mode == RAW_LOGPROBS:
        value_NC = value_NC - _log_sum_exp(vocabulary).unsqueeze(-1)
    ids, values = id_NC.to(torch.int32).cpu().numpy(), value_NC.cpu().numpy()
    return [
        TokenLogprobs(token_ids=ids[n, : count + 1].tobytes(), values=values[n, : count + 1].tobytes(), token_rank=rank)
        for n, (count, rank) in enumerate(zip(wanted, rank_N.tolist(), strict=True))
    ]


def _log_sum_exp(vocabulary: Vocabulary) -> Tensor:
    """Log-sum-exp [N], float32, summed block by block, so that a row does not depend on the number of rows."""
    best_N = vocabulary.best()
    mass_NK = (vocabulary.logits_RNB - best_N[:, None, None]).exp_().sum(-1)
    return best_N + mass_NK.double().sum(-1).log().float()
