"""Fields that both generating endpoints share, and `SamplingParams` from them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from hetis.core.sampling_params import LIMITS, SamplingParams
from hetis.server.errors import ApiError, refused, wrong_value
from hetis.server.protocol.fields import (
    LONGEST_STOP,
    MAX_STOP_STRINGS,
    MAX_TOKEN_LIST,
    Flag,
    Label,
    LogitBias,
    MaxTokens,
    Object,
    Stop,
    Text,
    TokenIds,
    sampling,
)
from hetis.server.protocol.reading import Body


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None  # a last chunk with the number of tokens
    continuous_usage_stats: bool | None = None  # with `include_usage`: the numbers so far on every chunk
    include_obfuscation: Literal[False] | None = None  # chunks are not padded to one length


class GenerationBody(Body, kw_only=True, frozen=True):
    """What a client may ask for besides the prompt. Null, or left out: the default.

    Fields that are passed to `SamplingParams` have its names.
    """

    model: Text = None
    stream: Flag = None
    stream_options: Annotated[
        StreamOptions | None,
        msgspec.Meta(description="an object with include_usage, continuous_usage_stats and include_obfuscation: false"),
    ] = None

    n: Annotated[Any, sampling("n")] = None
    temperature: Annotated[Any, sampling("temperature")] = None
    top_p: Annotated[Any, sampling("top_p")] = None
    top_k: Annotated[Any, sampling("top_k")] = None
    min_p: Annotated[Any, sampling("min_p")] = None
    presence_penalty: Annotated[Any, sampling("presence_penalty")] = None
    frequency_penalty: Annotated[Any, sampling("frequency_penalty")] = None
    repetition_penalty: Annotated[Any, sampling("repetition_penalty")] = None
    seed: Annotated[Any, sampling("seed")] = None
    stop: Stop = None
    stop_token_ids: TokenIds = None
    max_tokens: MaxTokens = None
    min_tokens: Annotated[Any, sampling("min_tokens")] = None
    ignore_eos: Flag = None
    prompt_logprobs: Annotated[Any, sampling("prompt_logprobs")] = None
    logit_bias: LogitBias = None
    skip_special_tokens: Flag = None
    spaces_between_special_tokens: Flag = None
    include_stop_str_in_output: Flag = None

    add_special_tokens: Flag = None
    return_token_ids: Flag = None
    return_tokens_as_token_ids: Flag = None

    # for the client's own records
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    request_id: Label = None
    session_id: Label = None
    metadata: Object = None

    def check_stream(self) -> None:
        """Raises ApiError 400 for fields that do not go with `stream`, as in vLLM."""
        if self.stream_options not in (None, StreamOptions()) and not self.stream:
            raise ApiError(400, "stream_options needs stream; set stream to true, or leave it out.", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(
                400, "prompt_logprobs cannot be streamed; set stream to false, or use echo.", "prompt_logprobs"
            )

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_usage_always(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


def sampling_params(
    body: GenerationBody, defaults: Mapping[str, Any], names: Mapping[str, str] | None = None, **given: Any
) -> SamplingParams:
    """Parameters of a request: `given`, else the fields of `body`, else `defaults`.

    `names`: the client's name of a parameter, where it is another one. Raises ApiError 400 that names the field.
    """
    _check_sizes(body)
    fields = {name: getattr(body, name) for name in SamplingParams.__struct_fields__ if hasattr(body, name)}
    values = dict(defaults) | {name: value for name, value in (fields | given).items() if value is not None}
    try:
        return SamplingParams(**{name: _whole(name, value) for name, value in values.items()})
    except ValueError as error:
        raise named_by_client(error, names or {}) from None


def named_by_client(error: ValueError, names: Mapping[str, str], otherwise: str = "prompt") -> ApiError:
    """The refusal of a parameter, with the client's name of it."""
    known = SamplingParams.__struct_fields__
    first = refused(error, known, otherwise, hidden="the tokenizer cannot encode the prompt; give token ids.")
    if first.param in names and first.param in known:
        client = names[first.param]
        return ApiError(400, client + first.message.removeprefix(first.param), client)
    return first


def _check_sizes(body: GenerationBody) -> None:
    """Raises ApiError for lists that are too long, before anything looks at their items."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop
    if isinstance(stops, list):
        if len(stops) > MAX_STOP_STRINGS:
            raise wrong_value("stop", body.stop, f"a list of at most {MAX_STOP_STRINGS} strings (it has {len(stops)})")
        for stop in stops:
            if isinstance(stop, str) and len(stop) > LONGEST_STOP:
                raise wrong_value("stop", stop, f"a string of at most {LONGEST_STOP} characters")
    for name in ("stop_token_ids", "logit_bias"):
        value = getattr(body, name)
        if isinstance(value, list | dict) and len(value) > MAX_TOKEN_LIST:
            raise ApiError(400, f"{name} has {len(value)} entries; give at most {MAX_TOKEN_LIST}.", name)


def _whole(name: str, value: Any) -> Any:
    """The integer where JSON has one written like 1.0."""
    is_integer = name in LIMITS and not LIMITS[name].real and isinstance(value, float) and value.is_integer()
    return int(value) if is_integer else value
