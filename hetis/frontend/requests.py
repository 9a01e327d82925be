"""Requests as the front end keeps them: their sequences, texts, and the pieces that are streamed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from hetis.core.messages import AbortRequest, AddRequest, TokenOutput
from hetis.core.outputs import CompletionOutput, Logprob, RequestOutput
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.frontend.detokenizer import Detokenizer

Decode = Callable[[int], str]

_MIX = 0x9E3779B97F4A7C15  # odd, for spreading the numbers of sequences over seeds


@dataclass(slots=True)
class Piece:
    """What is new in one completion. The last piece has its `finish_reason`, as in `CompletionOutput`.

    It is not frozen, since that would take three times as long to make.
    """

    prompt_index: int
    index: int  # of the completion, 0 .. n-1
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None  # per token of `token_ids`; None if not asked for
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class Completion:
    """One of the n completions of a prompt: one sequence of the engine."""

    def __init__(
        self,
        prompt_index: int,
        index: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: list[int],
        tokenizer: Any,
    ) -> None:
        self._prompt_index, self.params, self.seed = prompt_index, params, seed
        self._decode = decode_with(tokenizer)
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, params, prompt_token_ids)
        wants_logprobs = params.logprobs is not None
        self.output = CompletionOutput(index=index, text="", token_ids=[], logprobs=[] if wants_logprobs else None)
        self.output.cumulative_logprob = 0.0 if wants_logprobs else None

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def add(self, new: TokenOutput) -> Piece:
        """Appends new tokens; returns them with the text that is certain. A stop string finishes the completion."""
        output, token_ids, text, stop = self.output, new.token_ids, "", None
        if self._detokenizer is not None and token_ids:
            before = self._detokenizer.num_tokens
            text, stop = self._detokenise(self._detokenizer, new)
            token_ids = token_ids[: self._detokenizer.num_tokens - before]
        output.token_ids += token_ids
        logprobs = None if output.logprobs is None else self._add_logprobs(token_ids, new.logprobs or [])
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        elif new.finish_reason is not None:
            output.finish_reason, output.stop_reason, output.error = new.finish_reason, new.stop_reason, new.error
            if self._detokenizer is not None:
                text += self._detokenizer.finish()
        if self._detokenizer is not None:
            output.text = self._detokenizer.text
        return Piece(
            self._prompt_index,
            output.index,
            text,
            token_ids,
            logprobs,
            output.finish_reason,
            output.stop_reason,
            output.error,
        )

    @staticmethod
    def _detokenise(detokenizer: Detokenizer, new: TokenOutput) -> tuple[str, str | None]:
        """The new text that is certain, and the stop string that ended it or None."""
        *others, last = new.token_ids
        text, stop = detokenizer.append(others)
        if stop is None:
            end, stop = detokenizer.append((last,), hide=new.finish_reason == "stop")
            text += end
        return text, stop

    def _add_logprobs(self, token_ids: list[int], found: list[TokenLogprobs]) -> list[dict[int, Logprob]]:
        assert self.output.logprobs is not None
        rows = [named_logprobs(row, self._decode) for row in found[: len(token_ids)]]
        self.output.logprobs += rows
        total = sum(row[token].logprob for row, token in zip(rows, token_ids, strict=True))
        self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + total
        return rows


class Request:
    """A prompt and its n completions: all that is needed to run it, and all that has been generated.

    `id`: the caller's, not necessarily unique. `key`: unique at this front end. `prompt`: None if it was given as token
    ids. `prompt_logprobs`: in vLLM's form, complete from the first piece on; None if not asked for. `queued_s`,
    `prefill_s`: seconds in the queue and from there to the first token; None before it.
    """

    def __init__(
        self,
        request_id: str,
        key: str,
        prompt_index: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seeds: Sequence[int],
        tokenizer: Any,
    ) -> None:
        """`seeds`: of the n completions, see `resolve_seeds`."""
        self.id, self.key, self.params = request_id, key, params
        self.prompt, self.prompt_token_ids = prompt, prompt_token_ids
        self.queued_s: float | None = None
        self.prefill_s: float | None = None
        self._decode = decode_with(tokenizer)
        self._completions = [
            Completion(prompt_index, index, params.for_completion(index), seed, prompt_token_ids, tokenizer)
            for index, seed in enumerate(seeds)
        ]
        self._num_unfinished = len(self._completions)
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def num_completions(self) -> int:
        return len(self._completions)

    @property
    def finished(self) -> bool:
        return not self._num_unfinished

    def messages(self) -> Iterator[AddRequest]:
        """One sequence for each unfinished completion, with its output so far."""
        for completion in self._unfinished():
            output = completion.output
            yield AddRequest(
                id=f"{self.key}/{output.index}",
                token_ids=self.prompt_token_ids + output.token_ids,
                prompt_len=len(self.prompt_token_ids),
                seed=completion.seed,
                params=completion.params,
            )

    def aborts(self) -> list[AbortRequest]:
        """Messages that abort the unfinished completions."""
        return [AbortRequest(id=f"{self.key}/{completion.output.index}") for completion in self._unfinished()]

    def abort(self) -> list[Piece]:
        """Finishes the unfinished completions with the reason "abort"; returns their last pieces."""
        found = [self.add(TokenOutput(id=each.id, token_ids=[], finish_reason="abort"))[0] for each in self.aborts()]
        return [piece for piece in found if piece is not None]

    def add(self, new: TokenOutput) -> tuple[Piece | None, AbortRequest | None]:
        """Appends new tokens; returns the piece to stream, and an abort if a stop string finished the completion."""
        completion = self._completions[int(new.id.rpartition("/")[2])]
        if completion.finished:  # tokens drawn before the abort arrived
            return None, None
        if new.prompt_logprobs is not None and self.prompt_logprobs is not None:
            self.prompt_logprobs += [named_logprobs(row, self._decode) for row in new.prompt_logprobs]
        if new.queued_s is not None and self.queued_s is None:
            self.queued_s, self.prefill_s = new.queued_s, new.prefill_s
        piece = completion.add(new)
        if piece.finish_reason is None:
            return piece, None
        self._num_unfinished -= 1
        return piece, AbortRequest(id=new.id) if new.finish_reason is None else None

    def output(self) -> RequestOutput:
        """A copy of the outputs so far, in vLLM's form."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[_copy(completion.output) for completion in self._completions],
            finished=self.finished,
        )

    def _unfinished(self) -> list[Completion]:
        return [completion for completion in self._completions if not completion.finished]


def _copy(output: CompletionOutput) -> CompletionOutput:
    logprobs = None if output.logprobs is None else list(output.logprobs)
    return replace(output, token_ids=list(output.token_ids), logprobs=logprobs)


def resolve_seeds(params: SamplingParams, seed: int, numbers: Iterator[int]) -> list[int]:
    """The seed of each of the n sequences: the request's own, or one derived from `seed`, the fleet's, and the number
    of the sequence, the next of `numbers`. So the front end alone decides what is drawn."""
    own = [params.for_completion(index).seed for index in range(params.n)]
    return [(seed + next(numbers) * _MIX) % (1 << 63) if each is None else each for each in own]


def decode_with(tokenizer: Any) -> Decode | None:
    """A function from a token id to its text; None without a tokenizer. Safe to call from threads."""
    return None if tokenizer is None else _cached_decode(tokenizer.backend_tokenizer)


@lru_cache(maxsize=4)
def _cached_decode(backend: Any) -> Decode:
    """Log-probabilities name the same few thousand tokens again and again."""

    @lru_cache(maxsize=1 << 15)
    def decode(token: int) -> str:
        return str(backend.decode([token], skip_special_tokens=False))

    return decode


def named_logprobs(found: TokenLogprobs, decode: Decode | None) -> dict[int, Logprob]:
    """Token id -> log-probability at one position, in vLLM's form: the drawn token, then the best by rank."""
    named: dict[int, Logprob] = {}
    for token, value, rank in found.ranked():
        if token not in named:  # the drawn token may be among the best
            named[token] = Logprob(logprob=value, rank=rank, decoded_token=decode(token) if decode else None)
    return named
