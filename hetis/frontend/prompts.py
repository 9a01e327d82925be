"""Prompts and sampling parameters in all forms that users may give. Errors name the position of a wrong one."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Number
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

from hetis.core.sampling_params import SamplingParams, is_unicode

_FORMS = "give text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"


class PromptDict(TypedDict):
    """A prompt in vLLM's form. With both keys the ids are used, and the text is only copied to the output."""

    prompt: NotRequired[str]
    prompt_token_ids: NotRequired[Sequence[int]]


@runtime_checkable
class TokenArray(Protocol):
    """A one-dimensional array: numpy, torch, or another with these members."""

    @property
    def ndim(self) -> int: ...

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | TokenArray | PromptDict


class ReadPrompt:
    """A checked prompt: text, token ids, or token ids with the text that the user gave."""

    __slots__ = ("text", "token_ids")

    def __init__(self, text: str | None, token_ids: list[int] | None) -> None:
        self.text, self.token_ids = text, token_ids


def read_prompts(prompts: Prompt | Sequence[Prompt]) -> list[ReadPrompt]:
    """Reads one prompt or a list of prompts. Raises ValueError, with the position, for other values."""
    return [read_prompt(f"prompt {index}", prompt) for index, prompt in enumerate(_as_list(prompts))]


def read_params(sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Parameters for each of `count` prompts. Raises ValueError for a wrong number or type."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * count
    if not _is_list(sampling_params):
        raise ValueError(f"sampling_params is {kind_of(sampling_params)}; give SamplingParams(...), or a list of them.")
    for index, params in enumerate(sampling_params):
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params {index} is {kind_of(params)}; give SamplingParams(...).")
    if len(sampling_params) != count:
        raise ValueError(
            f"{count} prompts but {len(sampling_params)} sampling parameters; give one, or one per prompt."
        )
    return list(sampling_params)


def check_text(name: str, text: str) -> str:
    """Returns `text`. Raises ValueError for lone surrogates, which no tokenizer can encode."""
    if not is_unicode(text):
        position = next(index for index, character in enumerate(text) if 0xD800 <= ord(character) < 0xE000)
        raise ValueError(f"{name} is not valid Unicode (lone surrogate at position {position}); remove it.")
    return text


def _as_list(prompts: Any) -> Sequence[Any]:
    if isinstance(prompts, str | Mapping) or _is_array(prompts):
        return [prompts]
    if not _is_list(prompts):
        raise ValueError(f"prompts is {kind_of(prompts)}; {_FORMS}, or a list of these.")
    are_ids = any(isinstance(item, Number) for item in prompts)  # of any type: wrong ones are refused as token ids
    return [prompts] if are_ids and not any(isinstance(item, str | Mapping) for item in prompts) else prompts


def read_prompt(name: str, prompt: Any) -> ReadPrompt:
    """Reads one prompt. Raises ValueError, which begins with `name`, for other values."""
    if isinstance(prompt, str):
        return ReadPrompt(check_text(name, prompt), None)
    if isinstance(prompt, Mapping):
        return _read_mapping(name, prompt)
    return ReadPrompt(None, _token_ids(name, prompt))


def _read_mapping(name: str, prompt: Mapping[Any, Any]) -> ReadPrompt:
    unknown = [key for key in prompt if key not in PromptDict.__annotations__]
    if unknown or not prompt:
        what = f"the key {unknown[0]!r}" if unknown else "no keys"
        raise ValueError(f"{name} is a dict with {what}; known: {', '.join(PromptDict.__annotations__)}.")
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{name} has {kind_of(text)} as 'prompt'; give text.")
    if text is not None:
        check_text(name, text)
    if "prompt_token_ids" in prompt:
        return ReadPrompt(text, _token_ids(f"'prompt_token_ids' of {name}", prompt["prompt_token_ids"]))
    if text is None:
        raise ValueError(f"{name} has None as 'prompt'; give text.")
    return ReadPrompt(text, None)


def _token_ids(name: str, ids: Any) -> list[int]:
    if _is_array(ids):
        if ids.ndim != 1:
            raise ValueError(f"{name} is an array of shape {tuple(ids.shape)}; give one dimension of token ids.")
        ids = ids.tolist()
    elif not _is_list(ids):
        raise ValueError(f"{name} is {kind_of(ids)}; {_FORMS}.")
    for position, token in enumerate(ids):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(f"{name} has {_short(token)} at position {position}; token ids are integers.")
    return [int(token) for token in ids]


def _is_array(value: Any) -> bool:
    """Whether `value` is an array. Numpy's scalars have an array's members too, and are excluded."""
    return isinstance(value, TokenArray) and not isinstance(value, Number | memoryview)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def kind_of(value: Any) -> str:
    """The type of a value with its article, as in "an int", or "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    article = "an" if name[0].lower() in "aeiou" else "a"
    return f"{article} {name}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
