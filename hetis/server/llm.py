"""`LLM`: the offline class. Starts its own fleet, or, as the front end under torchrun, uses the one that runs."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from hetis.core.config import EngineConfig
from hetis.core.messages import FleetQuery, FleetStats, Outputs, TokenOutput
from hetis.core.outputs import RequestOutput
from hetis.core.sampling_params import SamplingParams
from hetis.core.sizes import parse_bytes
from hetis.server.client import EngineClient
from hetis.server.launch import plan_for
from hetis.server.requests import Piece, Request, RequestFailedError
from hetis.server.tokenizer import load_tokenizer

Prompt = str | Sequence[int]


class LLM:
    """One model over one fleet. A context manager; `close` ends all processes.

    Keyword arguments carry vLLM's names where the meaning is the same (see `EngineConfig`). `plan`: "P+A" or a plan
    file. `kv_cache_memory`: bytes or text like "2GiB", for every rank or by rank; None: decided from free memory.
    Raises ValueError for whatever does not fit together, and EngineDeadError when the fleet fails.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        kv_cache_memory: int | str | dict[int, int | str] | None = None,
        **options: Any,
    ) -> None:
        config = make_config(model=model, kv_cache_memory=kv_cache_memory, **options)
        _, spec, plan = plan_for(config)
        self.vocab_size = spec.vocab_size
        self._max_logprobs = config.max_logprobs
        self._num_requests = 0
        self._streams: dict[str, _Stream] = {}  # by request
        self._stats: deque[FleetStats] = deque()
        self._client = EngineClient(config, plan)
        try:
            # in this process, while the ranks start
            self.tokenizer = load_tokenizer(config.model if tokenizer is None else tokenizer, config.revision)
            ready = self._client.wait_until_ready()
        except BaseException:
            self._client.close()
            raise
        self.max_model_len, self.ledger = ready.max_model_len, ready.ledger

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts. A prompt is text or token ids; parameters are one for all, or one each.

        Raises ValueError for a bad prompt or parameter, before anything runs.
        """
        requests = self._make_requests(prompts, sampling_params)
        for _ in self._run(requests):
            pass
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Piece]:
        """Pieces of all answers as they come. Leaving the loop early aborts the rest."""
        return self._run(self._make_requests(prompts, sampling_params))

    def fleet_stats(self) -> FleetStats:
        """Counters of every device: role, heads, pages, attention time, bytes over links."""
        self._client.send(FleetQuery())
        while not self._stats:
            self._receive()
        return self._stats.popleft()

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: list[Request]) -> Iterator[Piece]:
        """Sends the requests and yields their pieces until all are finished."""
        stream = _Stream(requests)
        self._streams |= dict.fromkeys(stream.running, stream)
        try:
            for request in requests:
                for message in request.messages():
                    self._client.send(message)
            while stream.running or stream.pieces:
                while stream.pieces:
                    yield stream.pieces.popleft()
                if stream.error is not None:
                    raise ValueError(str(stream.error)) from stream.error
                if stream.running:
                    self._receive()
        finally:
            self._abort(list(stream.running.values()))

    def _receive(self) -> None:
        """The next message, to whom it belongs: other streams may be under way, and a question for the counters."""
        message = self._client.receive()
        if isinstance(message, FleetStats):
            self._stats.append(message)
        elif isinstance(message, Outputs):
            for new in message.outputs:
                self._take(new)

    def _take(self, new: TokenOutput) -> None:
        request_id = new.id.rpartition("/")[0]
        stream = self._streams.get(request_id)
        if stream is None:  # aborted; these tokens were drawn before the driver knew
            return
        request = stream.running[request_id]
        try:
            piece, abort = request.add(new)
        except RequestFailedError as error:
            stream.error = error
            return
        if piece is not None:
            stream.pieces.append(piece)
        if abort is not None:
            self._client.send(abort)
        if request.finished:
            del stream.running[request_id], self._streams[request_id]

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            del self._streams[request.id]
            for message in request.aborts() if self._client.is_open else ():
                self._client.send(message)

    def _make_requests(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        many = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(many)
        else:
            params = list(sampling_params)
        if len(params) != len(many):
            raise ValueError(f"{len(many)} prompts but {len(params)} sampling parameters: give one, or one per prompt.")
        return [
            self._make_request(index, prompt, p) for index, (prompt, p) in enumerate(zip(many, params, strict=True))
        ]

    def _make_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        params.validate_for(self.vocab_size, self._max_logprobs)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the model has no tokenizer: give prompts as token ids, or a tokenizer directory.")
            text, ids = prompt, list(self.tokenizer.encode(prompt))
        else:
            text, ids = None, [int(token) for token in prompt]
        if not ids:
            raise ValueError(f"prompt {index} is empty: give at least one token.")
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"prompt {index} has token id {outside[0]}: the vocabulary is 0 to {self.vocab_size - 1}.")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give stop_token_ids, or a tokenizer directory.")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and leaves no room for an answer: "
                f"max_model_len is {self.max_model_len}."
            )
        self._num_requests += 1
        return Request(str(self._num_requests), index, text, ids, params, self.tokenizer)


class _Stream:
    """The requests of one call, and what came for them and has not been handed out."""

    def __init__(self, requests: list[Request]) -> None:
        self.running = {request.id: request for request in requests}
        self.pieces: deque[Piece] = deque()
        self.error: RequestFailedError | None = None


def make_config(**options: Any) -> EngineConfig:
    """An `EngineConfig` from loose keyword arguments; ValueError names an unknown or impossible one."""
    unknown = sorted(set(options) - set(EngineConfig.__struct_fields__))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}: the options are {', '.join(EngineConfig.__struct_fields__)}.")
    model, memory = options.get("model"), options.get("kv_cache_memory")
    options["model"] = None if model is None else str(model)
    if isinstance(memory, dict):
        options["kv_cache_memory"] = {int(rank): parse_bytes(size) for rank, size in memory.items()}
    elif memory is not None:
        options["kv_cache_memory"] = parse_bytes(memory)
    for field in msgspec.structs.fields(EngineConfig):
        try:
            msgspec.convert(options.get(field.name, field.default), field.type)
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at ")[0]
            raise ValueError(f"{field.name} is {options[field.name]!r}: {what}.") from None
    return EngineConfig(**options)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (text or token ids) or many."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and all(isinstance(item, int) for item in many) else many
