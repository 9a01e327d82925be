"""What a benchmark does: server, workload, arrivals and figures, checked once."""

import math
from typing import Any, Literal, NamedTuple

import msgspec

Dataset = Literal["random", "shared-prefix", "trace"]
Backend = Literal["openai", "openai-chat"]
DEFAULT_NUM_PROMPTS = 200
ENDPOINTS: dict[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
    "client_queue_time": "wait before sending",
    "e2el_including_client_queue": "end-to-end latency from when due",
}
GOALS = ("ttft", "tpot", "e2el")  # for which goodput may set limits


class RampUp(NamedTuple):
    """A rate that grows over the run, from `ramp_up_start_rps` to `ramp_up_end_rps` requests per second."""

    ramp_up_strategy: Literal["linear", "exponential"]
    ramp_up_start_rps: float
    ramp_up_end_rps: float


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Fields have the names of the options of `hetis bench serve`. Raises ValueError, naming field and value."""

    base_url: str = "http://127.0.0.1:8000"
    backend: Backend = "openai"
    endpoint: str = ENDPOINTS["openai"]
    model_name: str | None = None
    tokenizer: str | None = None
    headers: dict[str, str] = {}
    insecure: bool = False
    ready_check_timeout_sec: float = 600.0
    request_timeout: float = 6 * 3600.0

    dataset_name: Dataset = "random"
    dataset_path: str | None = None
    num_prompts: int | None = None
    duration: float | None = None
    input_len: int = 256
    output_len: int = 64
    range_ratio: float = 0.0
    prefix_len: int = 256
    num_prefixes: int = 10
    trace_scale: float = 1.0
    trace_speed: float = 1.0
    seed: int = 0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = {}

    request_rates: tuple[float, ...] = (math.inf,)  # empty: the arrivals of the trace
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up: RampUp | None = None
    num_warmups: int = 0

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl", "e2el")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: dict[str, float] = {}
    show_progress: bool = True

    def __post_init__(self) -> None:
        for field in ("ready_check_timeout_sec", "request_timeout", "duration", "trace_scale", "trace_speed"):
            value = getattr(self, field)
            least = "at least 0" if field == "ready_check_timeout_sec" else "above 0"
            if value is not None and not (0 <= value < math.inf and (value > 0 or least == "at least 0")):
                raise ValueError(f"{field} is {value}: it must be a number {least}.")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness is {self.burstiness}: it must be above 0; 1 is a Poisson process.")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"range_ratio is {self.range_ratio}: it must be from 0 to less than 1.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be from 0 to 2^63 - 1.")

    @property
    def is_chat(self) -> bool:
        """Whether prompts are sent as the message of a chat."""
        return self.backend == "openai-chat"
