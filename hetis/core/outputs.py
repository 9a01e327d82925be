"""Results of generation. Attribute names are vLLM's, so that code written for it reads these as well."""

from dataclasses import dataclass

# the one error of a completion that is no fault of its request
MODEL_FAILED = "the model produced logits that are not finite."


@dataclass(slots=True)
class Logprob:
    """`logprob` in nats (a logit in the mode "raw_logits"); rank 1 is the best token of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence generated for a prompt."""

    index: int  # among the n sequences of the request
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # sum over token_ids; None when logprobs were not asked for
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the token first, then the best
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None while it goes on
    stop_reason: int | str | None = None  # the stop token id or stop string; None for the model's own end of sequence
    error: str | None = None  # why, when finish_reason is "error"; what was generated before is kept

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt with what was generated for it."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # per prompt token; the first has none
    outputs: list[CompletionOutput]
    finished: bool
