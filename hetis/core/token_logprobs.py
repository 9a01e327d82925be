"""Log-probabilities of one token and of the best ones, in the form in which they leave the sampler."""

import msgspec

SCORED_ROWS = 128  # prompt positions whose logits exist at once when a prompt is scored, which bounds their memory


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token, sampled or of the prompt, and the best `k` of the vocabulary.

    Entry 0 is the token itself; entries 1 .. k are the tokens of rank 1 .. k, in falling order, ties by token id. So
    the token occurs twice when it is among the best. Values are log-probabilities (nats), or logits in the mode
    "raw_logits".
    """

    token_ids: bytes  # int32 [1 + k]
    values: bytes  # float32 [1 + k]
    token_rank: int  # 1 + the number of tokens that are strictly better than the token itself

    def ranked(self) -> list[tuple[int, float, int]]:
        """(token id, value, rank) of every entry."""
        ids: list[int] = memoryview(self.token_ids).cast("i").tolist()
        values = memoryview(self.values).cast("f").tolist()
        ranks = [self.token_rank, *range(1, len(ids))]
        return list(zip(ids, values, ranks, strict=True))
