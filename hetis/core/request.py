"""A sequence in the engine: host-side state, owned by the driver."""

import re
from collections import abc
from operator import attrgetter

import msgspec

from hetis.core.sampling_params import SamplingParams

_ID = re.compile(r"(?:\d+:)?(.*?)(?:#\d+)?(?:/\d+)?", re.DOTALL)


class Sequence(msgspec.Struct, kw_only=True, eq=False):
    """One generation stream. A request with n > 1 is n sequences.

    `token_ids` holds prompt and output, as far as the driver knows it; `num_tokens` also counts what steps in flight
    draw. Steps that were sent compute the K and V of the first `num_scheduled` tokens; those that have come back, of
    the first `num_computed`. The prompt's tokens are prefill, computed in chunks on the primaries; every later token is
    decode. A preempted sequence is recomputed from 0: its known output is decode too, many tokens in a step, and its K
    and V get the same bits again.
    """

    id: str  # "0:cmpl-a#7/1": of front end 0, request "cmpl-a", its 7th, completion 1; see `request_id`
    token_ids: list[int]
    prompt_len: int
    params: SamplingParams
    max_tokens: int  # resolved: params.max_tokens cut to what the context allows
    seed: int  # resolved: params.seed or derived from the engine's seed
    stop_ids: frozenset[int]  # end-of-sequence ids (unless ignore_eos) and params.stop_token_ids
    arrival: int  # order of arrival
    # set by the scheduler
    slot: int = -1  # -1: waiting
    num_scheduled: int = 0
    num_computed: int = 0
    num_tokens: int = 0
    in_flight: int = 0  # rows in steps that have not come back
    num_preemptions: int = 0
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    stop_reason: int | str | None = None
    # set by the engine until the first token, which reports them; seconds on its clock
    queued_at: float | None = None
    admitted_at: float | None = None

    @property
    def request_id(self) -> str:
        """The id that its user knows; the driver and the front end have added the rest."""
        found = _ID.fullmatch(self.id)
        assert found is not None
        return found[1]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def is_complete(self) -> bool:
        """Whether it needs no further step: it has ended, or will by its length with a step in flight."""
        return self.finish_reason is not None or self.num_tokens >= self.prompt_len + self.max_tokens

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.prompt_len

    @property
    def is_generating(self) -> bool:
        """Whether all tokens that it had at its last step are computed, prompt and output."""
        return self.num_computed >= max(self.prompt_len, len(self.token_ids) - 1)


arrival_of = attrgetter("arrival")  # by which sequences are ordered


def check_token_ids(name: str, token_ids: abc.Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for a prompt, called `name`, that is empty or has a token outside the vocabulary."""
    if not token_ids:
        raise ValueError(f"{name} is empty: give at least one token.")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        outside = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name} has token id {outside}: the vocabulary is 0 to {vocab_size - 1}.")
