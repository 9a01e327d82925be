"""`LLM`: the offline class. Starts its own fleet, or, as the front end under torchrun, uses the one that runs."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Literal, Never, get_args

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.messages import FleetQuery, FleetStats
from hetis.core.outputs import RequestOutput
from hetis.core.request import check_token_ids
from hetis.core.sampling_params import SamplingParams
from hetis.core.sizes import parse_bytes
from hetis.frontend.chat import Conversation, as_conversations, render
from hetis.frontend.client import EngineClient
from hetis.frontend.progress import progress_bar
from hetis.frontend.prompts import Prompt, ReadPrompt, read_params, read_prompts
from hetis.frontend.requests import Piece, Request
from hetis.frontend.tokenizer import encode, load_tokenizer
from hetis.launch.checks import plan_for

_log = logging.getLogger("hetis")


class LLM:
    """One model over one fleet. A context manager; `close` ends all processes.

    Any thread may use it, also several at once; a process that is forked from this one may not.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | Path | None = None,
        plan: str | Path | dict[str, Any] = "1+0",
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        load_format: Literal["auto", "safetensors", "dummy"] = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        block_size: int = 32,
        kv_cache_memory: int | str | dict[int, int | str] | None = None,
        seed: int = 0,
        enforce_eager: bool = False,
        max_logprobs: int = 20,
        logprobs_mode: Literal["raw_logprobs", "raw_logits"] = "raw_logprobs",
        dispatch: Literal["hetis", "highs", "proportional", "even", "primary-only"] = "hetis",
        theta: float = 0.5,
        migration_budget: int = 256 << 20,
        profile: str | Path | None = None,
        profile_cache: bool = True,
        trace: str | Path | None = None,
        step_timeout: float = 60.0,
        oversubscribe: bool = False,
        progress: bool = True,
        **unknown: Never,
    ) -> None:
        """Names are vLLM's where the meaning is the same; `EngineConfig` says what each does.

        `model`: directory or hub id; None: the small model in the package. `plan`: "P+A", a plan file, or a dict of
        what stands in one. `kv_cache_memory`: bytes or text like "2GiB", for every rank or by rank; None: decided from
        free memory. Raises ValueError for whatever does not fit together, and EngineDeadError when the fleet fails.
        """
        given = {name: value for name, value in locals().items() if name in EngineConfig.__struct_fields__}
        config = make_config(**given, **unknown)
        _, spec, resolved = plan_for(config)
        self.vocab_size = spec.vocab_size
        self._max_logprobs = config.max_logprobs
        self._request_numbers = count(1)
        self._client = EngineClient(config, resolved)
        try:
            # in this process, while the ranks start
            self.tokenizer = _tokenizer_of(config)
            ready = self._client.wait_until_ready()
        except BaseException:
            self._client.close()
            raise
        self.max_model_len, self.ledger = ready.max_model_len, ready.ledger

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts.

        A prompt is text, token ids (a list, or a one-dimensional array of numpy or torch), `{"prompt": text}` or
        `{"prompt_token_ids": ids}`; parameters are one for all, or one each. `use_tqdm`: a progress bar for more than
        one prompt, where stderr is a terminal. `add_special_tokens`: text gets those that the tokenizer puts around it,
        such as the begin of sequence (once, if the text has it already).

        Raises ValueError for a bad prompt or parameter, before anything runs. A request that fails later costs no other
        its answer: its `finish_reason` is "error", and `error` says why.
        """
        requests = self._make_requests(read_prompts(prompts), sampling_params, add_special_tokens)
        return self._finish(requests, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to a conversation, or to each of several; their text is the output's `prompt`.

        `messages`: dicts with "role" and "content" (text, or a list of `{"type": "text", "text": ...}`).
        `chat_template`: Jinja text, or the name of one of the tokenizer's; None: the tokenizer's own. The other
        arguments go to the template. Raises ValueError as `generate` does, and for what the template does not take.
        """
        prompts = [
            ReadPrompt(
                render(
                    self.get_tokenizer(),
                    index,
                    conversation,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                ),
                None,
            )
            for index, conversation in enumerate(as_conversations(messages))
        ]
        # the template has put the special tokens where they belong
        return self._finish(self._make_requests(prompts, sampling_params, add_special_tokens=False), use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[Piece]:
        """Pieces of all answers as they come. Leaving the loop early aborts the rest."""
        return self._run(self._make_requests(read_prompts(prompts), sampling_params, add_special_tokens))

    def fleet_stats(self) -> FleetStats:
        """Counters of every device: role, heads, pages, attention time, bytes over links."""
        return self._client.ask(FleetQuery(), FleetStats)

    def get_tokenizer(self) -> Any:
        """The fast tokenizer, as transformers has it. ValueError if the model has none."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give prompts as token ids, or a tokenizer directory.")
        return self.tokenizer

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        """Runs them to their end."""
        num_tokens, start = 0, time.perf_counter()
        total = sum(request.num_completions for request in requests)
        with progress_bar("generating", total, show=use_tqdm and len(requests) > 1) as bar:
            for piece in self._run(requests):
                num_tokens += len(piece.token_ids)
                if piece.finished:
                    bar.advance(note=f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s")
        outputs = [request.output() for request in requests]
        errors = {index: c.error for index, output in enumerate(outputs) for c in output.outputs if c.error}
        for index, error in list(errors.items())[:1]:
            _log.warning("%d of %d prompts failed; prompt %d: %s", len(errors), len(outputs), index, error)
        return outputs

    def _run(self, requests: list[Request]) -> Iterator[Piece]:
        """Sends the requests and yields their pieces until all are finished."""
        running = {request.id: request for request in requests}
        try:
            inbox = self._client.open(running, (message for request in requests for message in request.messages()))
            while running:
                for new in inbox.get():
                    request = running.get(new.id.rpartition("/")[0])
                    if request is None:  # finished by a stop string; these tokens were drawn before the driver knew
                        continue
                    piece, abort = request.add(new)
                    if abort is not None:
                        self._client.send([abort])
                    if request.finished:
                        del running[request.id]
                        self._client.forget(request.id)
                    if piece is not None:
                        yield piece
        finally:
            self._abort(running.values())

    def _abort(self, requests: Iterable[Request]) -> None:
        if not self._client.is_open:
            return
        for request in requests:
            self._client.forget(request.id)
            self._client.send(request.aborts())

    def _make_requests(
        self,
        prompts: list[ReadPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
    ) -> list[Request]:
        params = read_params(sampling_params, len(prompts))
        return [
            self._make_request(index, prompt, one, add_special_tokens)
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]

    def _make_request(
        self, index: int, prompt: ReadPrompt, params: SamplingParams, add_special_tokens: bool
    ) -> Request:
        try:
            params.validate_for(self.vocab_size, self._max_logprobs)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give stop_token_ids, or a tokenizer directory.")
        ids = prompt.token_ids
        if ids is None:
            assert prompt.text is not None
            ids = encode(self.get_tokenizer(), prompt.text, add_special_tokens)
        check_token_ids(f"prompt {index}", ids, self.vocab_size)
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and leaves no room for an answer: "
                f"max_model_len is {self.max_model_len}."
            )
        return Request(str(next(self._request_numbers)), index, prompt.text, ids, params, self.tokenizer)


def _tokenizer_of(config: EngineConfig) -> Any:
    if config.tokenizer is None:
        return load_tokenizer(config.model, config.revision)
    return load_tokenizer(config.tokenizer, None, what="tokenizer")


def make_config(**options: Any) -> EngineConfig:
    """An `EngineConfig` from loose keyword arguments; ValueError names an unknown or impossible one."""
    unknown = sorted(set(options) - set(EngineConfig.__struct_fields__))
    if unknown:
        raise ValueError(f"LLM has no option {unknown[0]}; known: {', '.join(EngineConfig.__struct_fields__)}.")
    options = {name: str(value) if isinstance(value, PurePath) else value for name, value in options.items()}
    memory = options.get("kv_cache_memory")
    if isinstance(memory, dict):
        for rank in memory:
            if not isinstance(rank, int) or isinstance(rank, bool):
                raise ValueError(f"kv_cache_memory names rank {rank!r}: ranks are integers from 0.")
        options["kv_cache_memory"] = {rank: parse_bytes(size) for rank, size in memory.items()}
    elif memory is not None:
        options["kv_cache_memory"] = parse_bytes(memory)
    for field in msgspec.structs.fields(EngineConfig):
        try:
            msgspec.convert(options.get(field.name, field.default), field.type)
        except msgspec.ValidationError as error:
            known = [choice for choice in get_args(field.type) if isinstance(choice, str)]  # of a Literal
            what = f"known: {', '.join(known)}" if known else str(error).partition(" - at ")[0]
            raise ValueError(f"{field.name} is {options[field.name]!r}; {what}.") from None
    return EngineConfig(**options)
