"""Random prompts of a given length: token ids, or text that has that many tokens."""

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hetis.bench_serve.workloads import Shape

Prompt = str | list[int]
ROUNDS = 8  # tries to bring a text to its length
TRIED = 4096  # tokens that are tried for a round trip through text


class Codec(Protocol):
    """Text to token ids, without special tokens, and back."""

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ...

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        ...


class LocalCodec:
    """The tokenizer of a directory, as transformers loads it."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def vocabulary(self) -> list[int]:
        """Tokens that survive as text: no special ones, none that are a part of a character."""
        special = set(self._backend.get_added_tokens_decoder())
        ids = [id for id in sorted(self._backend.get_vocab().values()) if id not in special]
        if len(ids) > TRIED:
            ids = random.Random(0).sample(ids, TRIED)
        texts = self._backend.decode_batch([[id] for id in ids])
        again = self._backend.encode_batch(texts, add_special_tokens=False)
        return [id for id, found in zip(ids, again, strict=True) if list(found.ids) == [id]] or ids


class PromptMaker:
    """Makes the prompts of a run. `codec` None: prompts are token ids drawn from `vocabulary`.

    `how`: what the prompts are and where their tokens come from, for the report.
    """

    def __init__(self, vocabulary: Sequence[int], codec: Codec | None, how: str) -> None:
        self._vocabulary, self._codec, self.how = np.asarray(vocabulary), codec, how

    async def make(self, shapes: Sequence[Shape], prefix_len: int, seed: tuple[int, ...]) -> list[tuple[Prompt, int]]:
        """(prompt, number of its tokens) for each shape. The same seed makes the same prompts.

        A text that cannot be brought to its length has a few tokens more or less; the server's usage says how many.
        """
        draw, prefixes, made = np.random.default_rng(seed), dict[int, tuple[Prompt, int]](), []
        for prefix in sorted({shape.prefix for shape in shapes if shape.prefix is not None}):
            prefixes[prefix] = await self._random(draw, prefix_len)
        for shape in shapes:
            prompt, length = await self._random(draw, shape.input_len)
            if shape.prefix is not None:
                before, more = prefixes[shape.prefix]
                prompt, length = before + prompt, length + more  # type: ignore[operator]
            made.append((prompt, length))
        return made

    async def _random(self, draw: np.random.Generator, length: int) -> tuple[Prompt, int]:
        ids = draw.choice(self._vocabulary, size=length).tolist()
        if self._codec is None:
            return ids, length
        for _ in range(ROUNDS):
            text = await self._codec.decode(ids)
            ids = await self._codec.encode(text)
            num_tokens = len(ids)
            if num_tokens == length:
                break
            ids = [*ids[:length], *draw.choice(self._vocabulary, size=max(0, length - num_tokens)).tolist()]
        return text, num_tokens
