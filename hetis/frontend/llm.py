"""`LLM`: offline inference. Starts a fleet or, as the front end under torchrun, attaches to the running one."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Never

from hetis.core.messages import FleetQuery, FleetStats
from hetis.core.outputs import RequestOutput
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.chat import Conversation, as_conversations, render
from hetis.frontend.client import EngineClient
from hetis.frontend.intake import Intake, require_tokenizer, tokenizer_of
from hetis.frontend.options import make_config
from hetis.frontend.progress import progress_bar
from hetis.frontend.prompts import Prompt, ReadPrompt, read_params, read_prompts
from hetis.frontend.requests import Piece, Request

_log = logging.getLogger("hetis")


class LLM:
    """A model served by a fleet of devices. A context manager; `close` ends the processes of the fleet.

    Any thread may use it, also several at once; a forked child may not. Options, with vLLM's names where the meaning is
    the same (a rank is one process of the fleet, with one device):

    - model: directory or Hugging Face id; None: the small model in the package.
    - revision: branch, tag or commit of the model on the hub; None: main.
    - tokenizer: directory or Hugging Face id; None: that of the model.
    - plan: "P+A" (P primaries hold the weights, A attention workers only KV cache), a plan file, or its content.
    - device: "cpu", "cuda", "cuda:N" or "auto" (a GPU if there is one) of each rank for which the plan names none.
    - dtype: of weights, activations and KV cache; "auto": as in the checkpoint.
    - load_format: "auto" or "safetensors": read the checkpoint; "dummy": random weights.
    - max_model_len: most tokens of a prompt and its output together; None: what the model and the memory allow.
    - max_num_seqs: most sequences that run at once; others wait.
    - max_num_batched_tokens: most tokens computed at once, in all pipeline stages together.
    - block_size: tokens in a page of the KV cache.
    - kv_cache_memory: bytes, or text like "2GiB", for every rank or by rank ({0: "1GiB"}); None: from free memory.
    - seed: for requests without a seed, and for dummy weights.
    - enforce_eager: compute linear layers with plain torch, not with hetis's kernels; slower, for debugging.
    - async_scheduling: schedule the next step while one runs; False: when it has come back. Plans with several pipeline
      stages have a step per stage in flight, whatever this says.
    - max_logprobs: most log-probabilities per token that a request may ask for; -1: no limit.
    - logprobs_mode: "raw_logprobs" (nats) or "raw_logits"; before biases, penalties and temperature.
    - dispatch: placement of head groups: by measured speed ("hetis"), by free memory ("proportional"), the
      same number on each device ("even"), or all on the primaries ("primary-only").
    - theta: hysteresis threshold: lanes migrate when the slowest device exceeds the lower bound by this fraction.
    - migration_budget: most bytes of KV cache per second that migrate to balance the fleet; 0: none.
    - profile: file that `hetis profile` wrote; None: measured at start if there are attention workers.
    - profile_cache: False: measure every rank anew and by itself, and keep nothing for later starts.
    - trace: file for a Chrome trace of what every rank does; None: no trace.
    - step_timeout: seconds without an answer after which a rank counts as failed.
    - oversubscribe: start more ranks than the host has memory and cores for.
    - progress: show progress bars where stderr is a terminal.
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
        async_scheduling: bool = True,
        max_logprobs: int = 20,
        logprobs_mode: Literal["raw_logprobs", "raw_logits"] = "raw_logprobs",
        dispatch: Literal["hetis", "proportional", "even", "primary-only"] = "hetis",
        theta: float = 0.5,
        migration_budget: int = 256 << 20,
        profile: str | Path | None = None,
        profile_cache: bool = True,
        trace: str | Path | None = None,
        step_timeout: float = 60.0,
        oversubscribe: bool = False,
        progress: bool = True,
        **unknown: Never,  # refused by type checkers, and by `make_config` with the names that exist
    ) -> None:
        """Raises ValueError for options that are wrong or do not fit together, EngineDeadError when the fleet fails."""
        config = make_config(
            model=model, revision=revision, tokenizer=tokenizer, plan=plan, device=device, dtype=dtype,
            load_format=load_format, max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, block_size=block_size, kv_cache_memory=kv_cache_memory,
            seed=seed, enforce_eager=enforce_eager, async_scheduling=async_scheduling, max_logprobs=max_logprobs,
            logprobs_mode=logprobs_mode, dispatch=dispatch, theta=theta, migration_budget=migration_budget,
            profile=profile, profile_cache=profile_cache, trace=trace, step_timeout=step_timeout,
            oversubscribe=oversubscribe, progress=progress, **unknown,
        )  # fmt: skip
        self._client = EngineClient(config)
        try:
            self.tokenizer = tokenizer_of(config)  # while the ranks start
            ready = self._client.wait_until_ready()
        except BaseException:
            self._client.close()
            raise
        self._intake = Intake(config, self.tokenizer, ready)
        self.vocab_size, self.max_model_len, self.ledger = ready.vocab_size, ready.max_model_len, ready.ledger

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Generates completions of the prompts; returns one `RequestOutput` per prompt, in their order.

        A prompt is text, token ids (a list, or a one-dimensional array of numpy or torch), `{"prompt": text}` or
        `{"prompt_token_ids": ids}`. `sampling_params`: one for all prompts, or one each; None: the defaults.
        `use_tqdm`: show a progress bar for several prompts, where stderr is a terminal. `add_special_tokens`: encode
        text with the special tokens of the tokenizer, such as begin of sequence (once, if the text has it already).

        Raises ValueError for a wrong prompt or parameter, before any request runs. A request that fails later does not
        affect the others: its `finish_reason` is "error", and `error` is the reason.
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
        """Generates answers to one conversation or to each of several; the rendered text is the output's `prompt`.

        `messages`: dicts with "role" and "content" (text, or a list of `{"type": "text", "text": ...}`).
        `chat_template`: Jinja text, or the name of one of the tokenizer's templates; None: its default. The other
        arguments are passed to the template. Raises ValueError as `generate` does, and for what the template refuses.
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
        # the template has inserted the special tokens
        return self._finish(self._make_requests(prompts, sampling_params, add_special_tokens=False), use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[Piece]:
        """Yields pieces of all completions as they are generated. Leaving the loop early aborts what is unfinished.

        Arguments and errors are those of `generate`.
        """
        return self._client.stream(self._make_requests(read_prompts(prompts), sampling_params, add_special_tokens))

    def fleet_stats(self) -> FleetStats:
        """Counters of the fleet and of every rank: heads, pages, attention time, bytes sent over links."""
        return self._client.ask(FleetQuery(), FleetStats)

    def get_tokenizer(self) -> Any:
        """The fast tokenizer of transformers. Raises ValueError if the model has none."""
        return require_tokenizer(self.tokenizer)

    def close(self) -> None:
        """Ends all processes of the fleet; may be called again."""
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        """Runs the requests until they are finished, behind a progress bar."""
        num_tokens, start = 0, time.perf_counter()
        total = sum(request.num_completions for request in requests)
        with progress_bar("generating", total, show=use_tqdm and len(requests) > 1) as bar:
            for piece in self._client.stream(requests):
                num_tokens += len(piece.token_ids)
                if piece.finished:
                    bar.advance(note=f"{num_tokens / (time.perf_counter() - start):.0f} tokens/s")
        outputs = [request.output() for request in requests]
        errors = {index: c.error for index, output in enumerate(outputs) for c in output.outputs if c.error}
        for index, error in list(errors.items())[:1]:
            _log.warning("%d of %d prompts failed; prompt %d: %s", len(errors), len(outputs), index, error)
        return outputs

    def _make_requests(
        self,
        prompts: list[ReadPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
    ) -> list[Request]:
        params = read_params(sampling_params, len(prompts))
        return [
            self._intake.make(
                prompt,
                one,
                prompt_index=index,
                name=f"prompt {index}",
                params_name=f"prompt {index}: ",
                add_special_tokens=add_special_tokens,
            )
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
