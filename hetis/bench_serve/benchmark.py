"""A benchmark from the first question to the server to the figures of the last rate."""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from hetis.bench_serve import metrics
from hetis.bench_serve.arrivals import arrival_times
from hetis.bench_serve.errors import RequestError
from hetis.bench_serve.http_client import HttpClient
from hetis.bench_serve.load import LoadGenerator, Outcome, Prepared, allow_many_connections
from hetis.bench_serve.prompts import Prompt, PromptMaker
from hetis.bench_serve.server import ModelInfo, find_model, prompt_maker
from hetis.bench_serve.settings import DEFAULT_NUM_PROMPTS, Settings
from hetis.bench_serve.workloads import Shape, random_shapes, read_trace, scaled, with_prefixes
from hetis.core.sizes import plural
from hetis.frontend.console import write_message
from hetis.frontend.progress import progress_bar

CHECK, WARM_UP = 1_000_000, 1_000_001  # in place of the number of a run, so that their prompts are its own
LENGTHS, PREFIXES, PROMPTS, ARRIVALS = range(4)  # independent random streams of one seed


async def benchmark(settings: Settings, on_result: Callable[[metrics.Result], None]) -> None:
    """Runs the load once for each rate, one after the other, and hands the result of each to `on_result`.

    Raises ValueError if the server is not ready in time, refuses the first request, or the workload does not fit.
    """
    client = HttpClient(settings.base_url, settings.headers, verify=not settings.insecure)
    try:
        benchmark = Benchmark(settings, client)
        await benchmark.prepare()
        for index, rate in enumerate(settings.request_rates or (None,)):
            on_result(await benchmark.measure(index, rate))
    except RequestError as error:  # of a question to the server: failures of measured requests are results
        raise ValueError(f"the server does not answer ({error}); check that it still runs.") from None
    finally:
        client.close()


class Benchmark:
    """What all runs share: client, model and the way prompts are made."""

    def __init__(self, settings: Settings, client: HttpClient) -> None:
        self._settings, self._client = settings, client
        self._name = f"hetis-bench-{token_hex(4)}"  # begins request ids: those of two benchmarks at once must differ
        self._model = ModelInfo("", None, None)
        self._maker = PromptMaker((), None, "")

    async def prepare(self) -> None:
        """Asks the server what it is, sends it a first request, and warms it up."""
        settings = self._settings
        self._model = await find_model(self._client, settings.model_name, settings.ready_check_timeout_sec)
        self._check_lengths()
        self._maker = await prompt_maker(
            self._client, self._model, settings.tokenizer, settings.is_chat, settings.endpoint
        )
        write_message(f"hetis: measuring {self._model.id} at {settings.base_url}; prompts are {self._maker.how}")
        allow_many_connections()
        await self._check_request()
        if settings.num_warmups:
            await self._warm_up()

    def _check_lengths(self) -> None:
        settings, longest = self._settings, self._model.max_model_len
        prefix = settings.prefix_len if settings.dataset_name == "shared-prefix" else 0
        spread = 1 + settings.range_ratio
        total = prefix + int(settings.input_len * spread) + int(settings.output_len * spread)
        if settings.dataset_name != "trace" and longest is not None and total > longest:
            raise ValueError(
                f"requests of up to {total} tokens (prompt and output) do not fit the server's limit of {longest}; "
                "lower --input-len or --output-len."
            )

    async def _check_request(self) -> None:
        """Sends one request, so that a wrong option is one message and not a thousand failures."""
        [request] = await self._prepare([Shape(min(8, self._settings.input_len), 1)], [0.0], CHECK)
        outcome = await self._load(timeout=self._settings.request_timeout).run([request])
        if (failure := outcome.answers[0].failure) is not None:
            raise ValueError(f"the first request failed ({failure}); check --model, --endpoint and --backend.")

    async def _warm_up(self) -> None:
        shapes, _ = self._workload(0, self._settings.num_warmups)
        requests = await self._prepare(shapes, [0.0] * len(shapes), WARM_UP)
        with progress_bar("warm-up", len(requests), show=self._settings.show_progress) as bar:
            await self._load(on_done=lambda _: bar.advance()).run(requests)

    async def measure(self, index: int, rate: float | None) -> metrics.Result:
        """The result of run `index` at `rate` requests per second; None: at the times of the trace."""
        settings = self._settings
        shapes, times = self._workload(index, self._count(rate))
        if rate is not None:
            seed = (settings.seed, index, ARRIVALS)
            times = arrival_times(len(shapes), rate, settings.burstiness, seed, settings.ramp_up)
        requests = await self._prepare(shapes, times, index)
        title = "requests" if rate is None or math.isinf(rate) else f"{rate:g} requests/s"
        with progress_bar(title, len(requests), show=settings.show_progress) as bar:
            load = self._load(on_done=lambda _: bar.advance(), time_limit=settings.duration)
            outcome = await load.run(requests)
        return self._result(rate, outcome)

    def _load(self, **options: Any) -> LoadGenerator:
        settings = self._settings
        chosen = {"timeout": settings.request_timeout, "max_concurrency": settings.max_concurrency, **options}
        return LoadGenerator(self._client, **chosen)

    def _count(self, rate: float | None) -> int:
        """The number of requests of a run."""
        settings = self._settings
        if settings.num_prompts is not None:
            return settings.num_prompts
        if settings.duration is not None and rate is not None and math.isfinite(rate):
            return max(1, int(rate * settings.duration + 1e-6))
        return DEFAULT_NUM_PROMPTS

    def _workload(self, index: int, count: int) -> tuple[list[Shape], list[float]]:
        """Shapes of at most `count` requests and, for a trace, their due times; else no times."""
        settings, seed = self._settings, self._settings.seed
        if settings.dataset_name == "trace":
            return self._trace(count)
        shapes = random_shapes(
            count, settings.input_len, settings.output_len, settings.range_ratio, (seed, index, LENGTHS)
        )
        if settings.dataset_name == "shared-prefix":
            shapes = with_prefixes(shapes, settings.num_prefixes, (seed, index, PREFIXES))
        return shapes, []

    def _trace(self, count: int) -> tuple[list[Shape], list[float]]:
        """The first `count` rows of the trace that fit the model."""
        settings, longest = self._settings, self._model.max_model_len or math.inf
        rows = scaled(read_trace(Path(str(settings.dataset_path))), settings.trace_scale, settings.trace_speed)
        fitting = [row for row in rows if row.input_len + row.output_len <= longest]
        if not fitting:
            raise ValueError(f"no request of the trace fits the server's {longest} tokens; lower --trace-scale.")
        if len(fitting) < len(rows):
            left_out = plural(len(rows) - len(fitting), "request")
            write_message(f"hetis: {left_out} of the trace left out: longer than the server's {longest} tokens")
        chosen = fitting[:count]
        return [Shape(row.input_len, row.output_len) for row in chosen], [row.at - chosen[0].at for row in chosen]

    async def _prepare(self, shapes: Sequence[Shape], times: Sequence[float], index: int) -> list[Prepared]:
        """The encoded requests of run `index`. Each run has its own prompts: a prefix cache would favour the later."""
        settings = self._settings
        prompts = await self._maker.make(shapes, settings.prefix_len, (settings.seed, index, PROMPTS))
        return [
            Prepared(
                self._client.encode(
                    "POST",
                    settings.endpoint,
                    self.payload(prompt, shape.output_len),
                    {"x-request-id": f"{self._name}-{index}-{number}"},
                ),
                length,
                due,
            )
            for number, (shape, (prompt, length), due) in enumerate(zip(shapes, prompts, times, strict=True))
        ]

    def payload(self, prompt: Prompt, output_len: int) -> dict[str, Any]:
        """The JSON of a request."""
        settings = self._settings
        common = {"model": self._model.id, "stream": True, "stream_options": {"include_usage": True}}
        if settings.is_chat:
            messages = [{"role": "user", "content": prompt}]
            common |= {"messages": messages, "max_completion_tokens": output_len}
        else:
            common |= {"prompt": prompt, "max_tokens": output_len}
        if settings.ignore_eos:
            common["ignore_eos"] = True
        return common | settings.extra_body

    def _result(self, rate: float | None, outcome: Outcome) -> metrics.Result:
        """Figures of a run under vLLM's names, and what they were measured with."""
        settings, answers, delays = self._settings, outcome.answers, outcome.delays or [0.0]
        always = ("client_queue_time", "e2el_including_client_queue")
        return {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": settings.backend,
            "backend": settings.backend,
            "model_id": self._model.id,
            "tokenizer_id": settings.tokenizer or self._model.root,
            "num_prompts": len(answers),
            "dataset_name": settings.dataset_name,
            "request_rate": "trace" if rate is None else "inf" if math.isinf(rate) else rate,
            "burstiness": settings.burstiness,
            "max_concurrency": settings.max_concurrency,
            **({} if settings.ramp_up is None else settings.ramp_up._asdict()),
            **metrics.figures(
                answers,
                outcome.duration,
                percentiles=settings.percentiles,
                metrics=tuple(dict.fromkeys((*settings.metrics, *always))),
                goals_ms=settings.goodput,
            ),
            "prompts": self._maker.how,
            "output_tokens_from": metrics.token_source(answers),
            "empty_first_chunks": sum(answer.first_is_empty for answer in answers),
            "failures": metrics.failures(answers),
            "max_event_loop_delay_ms": 1000 * max(delays),
            "p99_event_loop_delay_ms": 1000 * float(np.percentile(delays, 99)),
        }
