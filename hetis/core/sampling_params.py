"""Sampling parameters of a request, with vLLM's names, defaults and limits."""

from collections.abc import Iterable
from math import inf
from numbers import Integral, Real
from sys import float_info
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

GREEDY_BELOW = 1e-5  # lower temperatures are greedy: the token of the highest logit
LOWEST_TEMPERATURE = 0.01  # other temperatures are raised to this, so that logits divided by it stay finite
MAX_SEQUENCES = 16_384
BIAS_LIMIT = 100.0
_INT64_MAX = 2**63 - 1
_LONGEST_ID = 10  # digits of a token id
_MAX_SHOWN = 80  # characters of a value in a sentence


class Limit(NamedTuple):
    """Range of a number: integers unless `real`; `low` is excluded if `is_open`; None is allowed if `optional`."""

    low: float
    high: float
    allowed: str  # for the error message
    real: bool = False
    is_open: bool = False
    optional: bool = False


LIMITS = {
    "n": Limit(1, MAX_SEQUENCES, f"an integer from 1 to {MAX_SEQUENCES}"),
    "temperature": Limit(0, 2, "a number from 0 (greedy) to 2", real=True),
    "top_p": Limit(0, 1, "a number above 0 and at most 1", real=True, is_open=True),
    "top_k": Limit(-1, _INT64_MAX, "an integer of 1 or more, or 0 or -1 (off)"),
    "min_p": Limit(0, 1, "a number from 0 to 1", real=True),
    "presence_penalty": Limit(-2, 2, "a number from -2 to 2", real=True),
    "frequency_penalty": Limit(-2, 2, "a number from -2 to 2", real=True),
    "repetition_penalty": Limit(0, float_info.max, "a finite number above 0", real=True, is_open=True),
    "seed": Limit(-(2**63), _INT64_MAX, "a 64-bit integer, or -1 or None (not fixed)", optional=True),
    "max_tokens": Limit(1, _INT64_MAX, "an integer of 1 or more, or None (fill the context)", optional=True),
    "min_tokens": Limit(0, _INT64_MAX, "an integer from 0 to max_tokens"),
    "logprobs": Limit(-1, _INT64_MAX, "an integer of 0 or more, -1 (whole vocabulary) or None", optional=True),
    "prompt_logprobs": Limit(-1, _INT64_MAX, "an integer of 0 or more, -1 (whole vocabulary) or None", optional=True),
}
_SWITCHES = (
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
)


class _KnownFieldsOnly(msgspec.StructMeta):
    """Metaclass that refuses unknown and positional arguments with a ValueError that names the fields."""

    if not TYPE_CHECKING:  # type checkers see the fields themselves

        def __call__(cls, *values, **fields):  # noqa: N805 (a metaclass)
            unknown = [name for name in fields if name not in cls.__struct_fields__]
            known = ", ".join(cls.__struct_fields__)
            if unknown:
                raise ValueError(f"{cls.__name__} has no {unknown[0]}; known: {known}.")
            if values:
                raise ValueError(f"{cls.__name__} takes keyword arguments only, as in temperature=0; known: {known}.")
            return super().__call__(**fields)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, metaclass=_KnownFieldsOnly):
    """Parameters of one request. Raises ValueError for one that is out of range, with its value and what is allowed.

    Several inputs are normalised: `stop` and `stop_token_ids` also take lists or None (and `stop` a single string),
    `top_k=-1` becomes 0, `seed=-1` becomes None, temperatures between greedy and 0.01 become 0.01, and biases are
    clamped to +-100.

    - n: sequences per prompt.
    - temperature: divides logits; 0: greedy.
    - top_p: sample from the fewest tokens whose probabilities add up to this; 1: all.
    - top_k: sample from this many most likely tokens; 0: all.
    - min_p: sample from tokens of at least this fraction of the best token's probability.
    - presence_penalty: subtracted from the logits of tokens that are in the output.
    - frequency_penalty: subtracted for every occurrence of a token in the output.
    - repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
    - seed: of the random numbers; None: derived from the seed of the fleet.
    - stop: strings that end the output.
    - stop_token_ids: token ids that end the output.
    - max_tokens: most tokens of the output; None: what the context allows.
    - min_tokens: tokens before which neither end-of-sequence nor stop tokens and strings end the output.
    - ignore_eos: continue after the model's end-of-sequence token.
    - logprobs: number of best tokens per output token with log-probabilities, besides the chosen one; -1: all.
    - prompt_logprobs: the same for every token of the prompt but the first.
    - logit_bias: added to logits, by token id.
    - skip_special_tokens: leave special tokens out of the text.
    - spaces_between_special_tokens: False: join adjacent special tokens without a space.
    - include_stop_str_in_output: keep the stop string or stop token in the text.
    - detokenize: make text of the tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        for field, limit in LIMITS.items():
            self._set(field, _number(field, getattr(self, field), limit))
        for field in _SWITCHES:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(_refusal(field, getattr(self, field), "True or False"))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        if self.top_k == -1:
            self._set("top_k", 0)
        if self.seed == -1:
            self._set("seed", None)
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            self._set("temperature", LOWEST_TEMPERATURE)
        self._check_pairs()

    def _set(self, field: str, value: Any) -> None:
        msgspec.structs.force_setattr(self, field, value)

    def _check_pairs(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            allowed = f"an integer from 0 to max_tokens, which is {self.max_tokens}"
            raise ValueError(_refusal("min_tokens", self.min_tokens, allowed))
        if self.is_greedy and self.n > 1:
            raise ValueError(_refusal("n", self.n, "1 when temperature is 0, as all sequences would be the same"))
        if self.stop and not self.detokenize:
            raise ValueError(_refusal("stop", list(self.stop), "empty when detokenize is False"))

    @property
    def is_greedy(self) -> bool:
        """Whether the token of the highest logit is chosen."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    def for_completion(self, index: int) -> "SamplingParams":
        """Parameters of the `index`-th of the n sequences: each has its own seed, and the first scores the prompt."""
        if self.n == 1:
            return self
        seed = self.seed
        if seed is not None:  # never -1, which would mean None, and within 64 bits
            seed = (seed + (index if seed >= 0 else -index) + 2**63) % 2**64 - 2**63
        scored = self.prompt_logprobs if index == 0 else None
        return msgspec.structs.replace(self, n=1, seed=seed, prompt_logprobs=scored)

    def validate_for(self, vocab_size: int, max_logprobs: int = 20) -> None:
        """Raises ValueError for token ids outside the vocabulary and for more than `max_logprobs` (-1: no limit)."""
        for field, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            outside = [token for token in ids if not 0 <= token < vocab_size]
            if outside:
                allowed = f"made of token ids from 0 to {vocab_size - 1}, the model's vocabulary"
                raise ValueError(_refusal(field, outside[0], allowed))
        for field, wanted in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if wanted is None or max_logprobs == -1:
                continue
            if (vocab_size if wanted == -1 else wanted) > max_logprobs:
                raise ValueError(_refusal(field, wanted, f"at most {max_logprobs}; raise max_logprobs to allow more"))


def _refusal(field: str, value: object, allowed: str) -> str:
    text = repr(value)
    shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{field} is {shown}, but must be {allowed}."


def _number(field: str, value: Any, limit: Limit) -> float | None:
    if value is None and limit.optional:
        return None
    kind = Real if limit.real else Integral
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not limit.low <= value <= limit.high or (limit.is_open and value == limit.low):  # NaN fails too
        raise ValueError(_refusal(field, value, limit.allowed))
    return float(value) if limit.real else int(value)


def _is_token_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < 2**31


def _stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _items("stop", stop, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(_refusal("stop", string, "made of strings that are not empty"))
        if not is_unicode(string):
            raise ValueError(_refusal("stop", string, "made of valid Unicode (it has a lone surrogate)"))
    return tuple(dict.fromkeys(strings))


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded as UTF-8, that is, has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _token_ids(ids: Iterable[int] | None) -> tuple[int, ...]:
    items = _items("stop_token_ids", ids, "a list of token ids")
    for token in items:
        if not _is_token_id(token):
            raise ValueError(_refusal("stop_token_ids", token, "made of token ids, integers of 0 or more"))
    return tuple(dict.fromkeys(int(token) for token in items))


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and -inf <= value <= inf  # not NaN


def _biases(biases: Any) -> dict[int, float]:
    """Biases by token id, clamped. Keys may be decimal strings, as in JSON."""
    if biases is None:
        return {}
    if not isinstance(biases, dict):
        raise ValueError(_refusal("logit_bias", biases, "a mapping of token ids to numbers"))
    clamped = {}
    for key, bias in biases.items():
        is_decimal = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= _LONGEST_ID
        token = int(key) if is_decimal else key
        if not _is_token_id(token):
            raise ValueError(_refusal("logit_bias", key, "keyed by token ids, integers of 0 or more"))
        if not _is_number(bias):
            raise ValueError(_refusal(f"logit_bias[{token}]", bias, "a number (beyond +-100 it is clamped)"))
        clamped[int(token)] = float(min(max(bias, -BIAS_LIMIT), BIAS_LIMIT))
    return clamped


def _items(field: str, value: Any, allowed: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable):
        raise ValueError(_refusal(field, value, allowed))
    return tuple(value)
