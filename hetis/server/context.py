"""What all request handlers share: `request.app.state.server`."""

import time
from typing import TYPE_CHECKING, Any

from hetis.core.messages import EngineStatus
from hetis.frontend.generation_config import sampling_defaults
from hetis.server.activity_log import ActivityLog
from hetis.server.admission import Admission, State
from hetis.server.feed import Feed
from hetis.server.fingerprint import system_fingerprint
from hetis.server.health import HealthMonitor
from hetis.server.metrics import Metrics
from hetis.server.options import ServerOptions
from hetis.server.sampler import FleetSampler
from hetis.server.tracing import make_tracing

if TYPE_CHECKING:
    from hetis.frontend.async_llm import AsyncLLM

PACKAGED_NAME = "hetis-small"  # of the model in the package


class Server:
    """The engine, the options, and what the parts of the server know about each other.

    - model_names: what clients may name as the model; the first one is shown.
    - sampling_defaults: fields of `SamplingParams` that apply where a request is silent.
    - created: Unix time of the start, in seconds.
    - fingerprint: of the fleet, for `system_fingerprint`.
    - metrics, tracing: count and trace requests. feed: shows the fleet to those who watch. activity: logs its work.
    - is_draining: the server ends, and takes no new requests.
    """

    def __init__(self, llm: "AsyncLLM", options: ServerOptions) -> None:
        self.llm, self.options = llm, options
        self.model_names = options.served_model_names or (llm.config.model or PACKAGED_NAME,)
        use_defaults = options.generation_config == "auto"
        self.sampling_defaults: dict[str, Any] = sampling_defaults(llm.config) if use_defaults else {}
        self.created = int(time.time())
        self.is_draining = False
        self.fingerprint = system_fingerprint(llm.config)
        sampler = FleetSampler(llm)
        self.metrics = Metrics(sampler, self.model_names[0], options.metrics_prefix)
        self.tracing = make_tracing(options.otlp_traces_endpoint, self.model_names[0])
        self.feed = Feed(sampler, self.metrics, self.model_names[0], lambda: self.state)
        self.activity = ActivityLog(self.metrics, lambda: self.status)
        self.health = HealthMonitor(llm, options.health_timeout)
        self.admission = Admission(
            llm.config.max_num_seqs, options.max_queued_requests, lambda: self.state, lambda: self.status
        )

    @property
    def state(self) -> State:
        if self.llm.dead_reason is not None:
            return "dead"
        if self.is_draining:
            return "draining"
        return "ready" if self.llm.is_ready else "starting"

    @property
    def status(self) -> EngineStatus | None:
        """The engine's latest status: with outputs while steps run, else once a second."""
        found = [status for status in (self.llm.status, self.health.status) if status is not None]
        return max(found, key=lambda status: status.step, default=None)
