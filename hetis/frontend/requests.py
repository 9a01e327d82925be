"""Requests in flight at the front end: their completions, texts, and the pieces that are streamed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hetis.core.messages import AbortRequest, AddRequest, TokenOutput
from hetis.core.outputs import CompletionOutput, Logprob, RequestOutput
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.frontend.detokenizer import Detokenizer

Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text and tokens of one completion. The last piece has the `finish_reason` of `CompletionOutput`."""

    prompt_index: int
    index: int  # of the completion, 0 .. n-1
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class Completion:
    """One of the n completions of a prompt."""

    def __init__(self, index: int, params: SamplingParams, prompt_token_ids: list[int], tokenizer: Any) -> None:
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

    def add(self, new: TokenOutput) -> str:
        """Appends new tokens; returns the text that is certain. A stop string finishes the completion."""
        output, text = self.output, ""
        for position, token in enumerate(new.token_ids):
            output.token_ids.append(token)
            if new.logprobs is not None and output.logprobs is not None:
                self._add_logprobs(new.logprobs[position])
            if self._detokenizer is not None:
                ends_here = new.finish_reason == "stop" and position == len(new.token_ids) - 1
                piece, stop = self._detokenizer.append([token], hide=ends_here)
                text += piece
                if stop is not None:
                    output.finish_reason, output.stop_reason = "stop", stop
                    break
        if not self.finished and new.finish_reason is not None:
            output.finish_reason, output.stop_reason, output.error = new.finish_reason, new.stop_reason, new.error
            if self._detokenizer is not None:
                text += self._detokenizer.finish()
        if self._detokenizer is not None:
            output.text = self._detokenizer.text
        return text

    def _add_logprobs(self, found: TokenLogprobs | None) -> None:
        assert self.output.logprobs is not None
        if found is None:
            return
        row = named_logprobs(found, self._decode)
        self.output.logprobs.append(row)
        self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + row[
            self.output.token_ids[-1]
        ].logprob


class Request:
    """A prompt and its n completions."""

    def __init__(
        self,
        request_id: str,
        prompt_index: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Any,
    ) -> None:
        self.id, self._prompt_index, self._params = request_id, prompt_index, params
        self._decode = decode_with(tokenizer)
        self._prompt, self._prompt_token_ids = prompt, prompt_token_ids
        self._completions = [Completion(index, params, prompt_token_ids, tokenizer) for index in range(params.n)]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    @property
    def num_completions(self) -> int:
        return len(self._completions)

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self._completions)

    def messages(self) -> Iterator[AddRequest]:
        """One sequence per completion; each has its own seed, and only the first scores the prompt."""
        for index in range(self._params.n):
            yield AddRequest(
                id=f"{self.id}/{index}", token_ids=self._prompt_token_ids, params=self._params.for_completion(index)
            )

    def aborts(self) -> list[AbortRequest]:
        """Messages that abort the unfinished completions."""
        return [
            AbortRequest(id=f"{self.id}/{completion.output.index}")
            for completion in self._completions
            if not completion.finished
        ]

    def add(self, new: TokenOutput) -> tuple[Piece | None, AbortRequest | None]:
        """Appends new tokens; returns the piece to stream, and an abort if a stop string finished the completion."""
        completion = self._completions[int(new.id.rpartition("/")[2])]
        if completion.finished:  # tokens drawn before the abort arrived
            return None, None
        if new.prompt_logprobs is not None and self._prompt_logprobs is not None:
            self._prompt_logprobs += [named_logprobs(row, self._decode) for row in new.prompt_logprobs]
        text = completion.add(new)
        abort = AbortRequest(id=new.id) if completion.finished and new.finish_reason is None else None
        output = completion.output
        piece = Piece(self._prompt_index, output.index, text, new.token_ids, output.finish_reason, output.error)
        return piece, abort

    def output(self) -> RequestOutput:
        """The outputs so far, in vLLM's form."""
        return RequestOutput(
            request_id=self.id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=[completion.output for completion in self._completions],
            finished=self.finished,
        )


def decode_with(tokenizer: Any) -> Decode | None:
    """A function from a token id to its text; None without a tokenizer. Safe to call from threads."""
    if tokenizer is None:
        return None
    backend = tokenizer.backend_tokenizer
    return lambda token: str(backend.decode([token], skip_special_tokens=False))


def named_logprobs(found: TokenLogprobs, decode: Decode | None) -> dict[int, Logprob]:
    """Token id -> log-probability at one position, in vLLM's form: the drawn token, then the best by rank."""
    named: dict[int, Logprob] = {}
    for token, value, rank in found.ranked():
        if token not in named:  # the drawn token may be among the best
            named[token] = Logprob(logprob=value, rank=rank, decoded_token=decode(token) if decode else None)
    return named
