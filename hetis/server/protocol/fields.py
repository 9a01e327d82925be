"""Types of request fields, with what they accept, and the schemas of the fields of `SamplingParams`.

Every field may be null or left out, which means its default.
"""

from typing import Annotated, Any

from msgspec import Meta

from hetis.core.sampling_params import LIMITS, Limit

MAX_PROMPTS = 1024  # of a request, as in vLLM
MAX_STOP_STRINGS = 4  # as in OpenAI and vLLM
LONGEST_STOP = 256  # characters: a stop string is held as an automaton with a state for each of them
MAX_TOKEN_LIST = 4096  # ids in stop_token_ids, keys in logit_bias: each step applies them to the logits
MAX_LABEL = 512  # characters

_TOKEN_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PART: dict[str, Any] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "description": "system, user, assistant, or what the chat template knows"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
}


def _field(*kinds: dict[str, Any], description: str) -> Meta:
    """Schema of a value that hetis checks itself."""
    return Meta(extra_json_schema={"anyOf": [*kinds, {"type": "null"}]}, description=description)


def sampling(name: str) -> Meta:
    """Schema of a number of `SamplingParams`, which checks it."""
    limit = LIMITS[name]
    return _field(_number(limit), description=limit.allowed.replace("None", "null"))


def _number(limit: Limit) -> dict[str, Any]:
    low = "exclusiveMinimum" if limit.is_open else "minimum"
    return {"type": "number" if limit.real else "integer", low: limit.low, "maximum": limit.high}


Flag = Annotated[bool | None, Meta(description="true or false")]
Text = Annotated[str | None, Meta(description="a text")]
Label = Annotated[
    Annotated[str, Meta(max_length=MAX_LABEL)] | None, Meta(description=f"a text of at most {MAX_LABEL} characters")
]
Object = Annotated[dict[str, Any] | None, Meta(description="an object")]
MaxTokens = Annotated[Any, sampling("max_tokens")]
TokenIds = Annotated[
    Any,
    _field(
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": MAX_TOKEN_LIST},
        description=f"a list of at most {MAX_TOKEN_LIST} token ids",
    ),
]
Stop = Annotated[
    Any,
    _field(
        {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP},
            "maxItems": MAX_STOP_STRINGS,
        },
        description=f"a string or a list of at most {MAX_STOP_STRINGS}, each of 1 to {LONGEST_STOP} characters",
    ),
]
LogitBias = Annotated[
    Any,
    _field(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number"},
            "maxProperties": MAX_TOKEN_LIST,
        },
        description=f"an object of at most {MAX_TOKEN_LIST} token ids with numbers, which are clamped to +-100",
    ),
]
Prompt = Annotated[
    Any,
    Meta(
        extra_json_schema={
            "anyOf": [
                {"type": "string", "minLength": 1},
                _TOKEN_IDS,
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
        description=f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of these",
    ),
]
Messages = Annotated[
    Any,
    Meta(
        extra_json_schema={"type": "array", "items": _MESSAGE, "minItems": 1},
        description="a list of messages with role and content",
    ),
]
