"""Metrics with the prefix and the labels that all metrics of one server have."""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from hetis.server.telemetry_options import read_prefix


class MetricFactory:
    """Makes metrics: those that count themselves, and families of samples, which a collector makes at every scrape."""

    def __init__(self, prefix: str, labels: Mapping[str, str], registry: CollectorRegistry) -> None:
        """`prefix`: see `read_prefix`. `labels`: of every metric."""
        self._prefix, self._names, self._values = read_prefix(prefix), tuple(labels), tuple(labels.values())
        self._registry = registry

    def counter(self, name: str, text: str) -> Counter:
        return Counter(self._prefix + name, text, self._names, registry=self._registry).labels(*self._values)

    def counters(self, name: str, text: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        """A counter for each value of a label; all are there from the start."""
        parent = Counter(self._prefix + name, text, (*self._names, label), registry=self._registry)
        return {value: parent.labels(*self._values, value) for value in values}

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        parent = Histogram(self._prefix + name, text, self._names, registry=self._registry, buckets=buckets)
        return parent.labels(*self._values)

    # --- families -----------------------------------------------------------------------------------------------------

    def gauges(self, name: str, text: str, *labels: str) -> "Family":
        return Family(GaugeMetricFamily(self._prefix + name, text, labels=(*self._names, *labels)), self._values)

    def totals(self, name: str, text: str, *labels: str) -> "Family":
        """Counters; "_total" is added to the name."""
        return Family(CounterMetricFamily(self._prefix + name, text, labels=(*self._names, *labels)), self._values)

    def histogram_of(
        self, name: str, text: str, bounds: Sequence[float], counts: Sequence[float], total: float
    ) -> HistogramMetricFamily:
        """A histogram that was counted elsewhere. `counts`: of each bucket alone, the last one above all `bounds`."""
        family = HistogramMetricFamily(self._prefix + name, text, labels=self._names)
        cumulated, found = 0.0, []
        for bound, count in zip((*map(str, map(float, bounds)), "+Inf"), counts, strict=True):
            cumulated += count
            found.append((bound, cumulated))
        family.add_metric(self._values, found, total)
        return family


class Family:
    """Samples of one metric."""

    def __init__(self, metric: GaugeMetricFamily | CounterMetricFamily, values: Sequence[str]) -> None:
        """`values`: of the labels that all samples have."""
        self.metric, self._values = metric, values

    def add(self, value: float, *labels: object) -> "Family":
        """`labels`: values of the metric's own labels."""
        self.metric.add_metric((*self._values, *map(str, labels)), value)
        return self
