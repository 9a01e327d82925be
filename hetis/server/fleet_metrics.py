"""Metrics of the fleet, made at every scrape from the latest snapshot: queues, devices, links, migrations."""

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hetis.core.messages import STEP_TOKEN_BOUNDS, DeviceState, FleetSnapshot
from hetis.server.metric_factory import MetricFactory
from hetis.server.sampler import FleetSampler

DEVICE_LABELS = ("rank", "role", "device", "device_name")
# name, text, value
_GAUGES: tuple[tuple[str, str, Callable[[DeviceState], float]], ...] = (
    ("device_kv_pages_used", "KV pages in use, over all pools of the rank.", lambda device: device.pages_used),
    ("device_kv_pages", "KV pages that the rank has.", lambda device: device.pages_total),
    ("device_heads", "Query heads held, over all sequences and stages.", lambda device: device.heads),
    (
        "device_attention_predicted_seconds",
        "Decode attention of a layer as predicted, mean over the steps in which the rank had heads.",
        lambda device: 1e-6 * device.predicted_us,
    ),
    (
        "device_attention_measured_seconds",
        "Decode attention of a layer as measured, mean over the steps in which the rank had heads.",
        lambda device: 1e-6 * device.measured_us,
    ),
    ("device_silent_seconds", "Since the last heartbeat of the rank.", lambda device: device.silent_seconds),
)
_TOTALS: tuple[tuple[str, str, Callable[[DeviceState], float]], ...] = (
    ("device_busy_seconds", "Time in steps without waiting.", lambda device: device.busy_seconds),
    ("device_wait_seconds", "Time in steps that the rank has waited for others.", lambda device: device.wait_seconds),
    ("device_attention_seconds", "Time of attention, part of the busy time.", lambda device: device.attention_seconds),
)


class FleetCollector(Collector):
    """Shows the latest snapshot, however old: its age is a metric, too."""

    def __init__(self, sampler: FleetSampler, factory: MetricFactory) -> None:
        self._sampler, self._factory = sampler, factory

    def describe(self) -> list[Metric]:
        """Nothing: names are known at a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._sampler.latest
        if snapshot is None:
            return
        make = self._factory
        yield (
            make.gauges("fleet_snapshot_age_seconds", "Age of all numbers about the fleet.")
            .add(self._sampler.age)
            .metric
        )
        yield from self._status(snapshot)
        yield from self._counters(snapshot)
        yield from self._devices(snapshot)
        yield self._migrations(snapshot)
        yield self._links(snapshot)

    def _status(self, snapshot: FleetSnapshot) -> Iterator[Metric]:
        make, status = self._factory, snapshot.status
        yield make.gauges("num_requests_running", "Sequences that run.").add(status.num_running).metric
        yield make.gauges("num_requests_waiting", "Sequences in the queue.").add(status.num_waiting).metric
        yield make.gauges("kv_cache_usage_perc", "KV pages in use, 1 means all.").add(status.kv_usage).metric
        yield make.gauges("step_in_flight_seconds", "Age of the oldest step.").add(status.in_flight_seconds).metric
        yield make.totals("engine_steps", "Steps finished.").add(status.step).metric
        yield (make.totals("num_preemptions", "Sequences that are computed anew.").add(status.num_preemptions).metric)

    def _counters(self, snapshot: FleetSnapshot) -> Iterator[Metric]:
        make, counters = self._factory, snapshot.counters
        yield make.totals("dispatches", "Sequences that were placed.").add(counters.num_dispatches).metric
        yield make.totals("rebalances", "Decisions to move heads for balance.").add(counters.num_rebalances).metric
        yield make.totals("reliefs", "Decisions to move heads since pages ran out.").add(counters.num_reliefs).metric
        yield make.totals("migrations", "Heads' lanes that have moved.").add(counters.num_migrations).metric
        yield make.totals("migrated_bytes", "Bytes of pages that have moved.").add(counters.migrated_bytes).metric
        if counters.step_tokens:
            yield make.histogram_of(
                "iteration_tokens_total",
                "New tokens of a step, of prompts and of outputs.",
                STEP_TOKEN_BOUNDS,
                counters.step_tokens,
                counters.num_step_tokens,
            )

    def _devices(self, snapshot: FleetSnapshot) -> Iterator[Metric]:
        for make, rows in ((self._factory.gauges, _GAUGES), (self._factory.totals, _TOTALS)):
            for name, text, value in rows:
                family = make(name, text, *DEVICE_LABELS)
                for device in snapshot.devices:
                    family.add(value(device), *_labels(device))
                yield family.metric

    def _migrations(self, snapshot: FleetSnapshot) -> Metric:
        """A migrated lane counts at both of its devices."""
        text = "Heads' lanes that have moved to the rank (in) and from it (out)."
        family = self._factory.totals("device_migrations", text, *DEVICE_LABELS, "direction")
        for device in snapshot.devices:
            family.add(device.lanes_in, *_labels(device), "in")
            family.add(device.lanes_out, *_labels(device), "out")
        return family.metric

    def _links(self, snapshot: FleetSnapshot) -> Metric:
        """Bytes at both ends of each direction, so that a device's traffic is a sum over its own samples."""
        text = "Bytes over the links between primaries and attention workers."
        family = self._factory.totals("device_link_bytes", text, *DEVICE_LABELS, "peer", "direction")
        labels = {device.rank: _labels(device) for device in snapshot.devices}
        for link in snapshot.links:
            family.add(link.num_bytes, *labels[link.source], link.target, "sent")
            family.add(link.num_bytes, *labels[link.target], link.source, "received")
        return family.metric


def _labels(device: DeviceState) -> tuple[object, ...]:
    """Values of `DEVICE_LABELS`."""
    return device.rank, device.role, device.device, device.name
