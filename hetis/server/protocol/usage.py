"""Token counts of a response."""

import msgspec


class Usage(msgspec.Struct):
    """Tokens of all prompts and of all their completions."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)
