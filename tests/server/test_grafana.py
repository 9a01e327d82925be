"""The Grafana dashboard asks only for metrics and labels that the server exports."""

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hetis.server.http_metrics import HttpMetrics
from hetis.server.metrics import Metrics
from hetis.server.sampler import FleetSampler
from tests.server.watched_engine import FakeRequest, WatchedEngine, make_snapshot

DASHBOARD = Path(__file__).parents[2] / "docs" / "deploy" / "grafana.json"
STRING = re.compile(r'"[^"]*"')
SELECTOR = re.compile(r"([a-zA-Z_][\w:]*)\{([^}]*)\}")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
NAME = re.compile(r"(?<![\w:$.])([a-zA-Z_][\w:]*)(?![\w:]*\s*\()")
LEGEND = re.compile(r"\{\{(\w+)\}\}")
OF_SCRAPERS = {"instance", "job"}  # labels that Prometheus adds
Exported = dict[str, set[str]]


def queries() -> Iterator[tuple[str, str, str]]:
    """(title, query, legend)"""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield (
                variable["name"],
                re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["definition"]),
                "",
            )


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Labels by name of a sample, from a scrape of a server that has served a request."""
    metrics = Metrics(FleetSampler(WatchedEngine(make_snapshot(1.0))), "tiny")  # type: ignore[arg-type]
    metrics.begin(FakeRequest(), "/v1/completions").finish("stop")  # type: ignore[arg-type]

    async def nothing(*arguments: object) -> None: ...

    async def run() -> bytes:
        middleware = HttpMetrics(nothing, metrics.registry, ())
        await middleware({"type": "http", "method": "GET", "path": "/"}, nothing, nothing)  # type: ignore[arg-type]
        return await metrics.render()

    found: Exported = defaultdict(set)
    for family in text_string_to_metric_families(asyncio.run(run()).decode()):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
    return found


def names_in(query: str) -> set[str]:
    """Names of metrics in a PromQL expression."""
    plain = STRING.sub('""', query)
    for pattern in (GROUPING, re.compile(r"\[[^\]]*\]"), re.compile(r"\{[^}]*\}")):
        plain = pattern.sub(" ", plain)
    return set(NAME.findall(plain))


def labels_in(query: str, legend: str) -> set[str]:
    bodies = [body for _, body in SELECTOR.findall(STRING.sub('""', query))]
    selected = [label for body in bodies for label in re.findall(r"(\w+)\s*=", body)]
    grouped = [label.strip() for group in GROUPING.findall(query) for label in group.split(",")]
    return {*selected, *grouped, *LEGEND.findall(legend)} - {""}


@pytest.mark.parametrize(("title", "query", "legend"), list(queries()), ids=lambda value: str(value)[:40])
def test_a_query_finds_its_metric_and_labels(title: str, query: str, legend: str, exported: Exported) -> None:
    names = names_in(query)
    assert names, f"{title}: {query} names no metric"
    for name in names:
        assert name in exported, f"{title} asks for {name}, which the server does not export"
        missing = labels_in(query, legend) - exported[name] - OF_SCRAPERS
        assert not missing, f"{title} uses the labels {missing}, which {name} does not have"


def test_the_names_of_an_expression_are_found() -> None:
    query = 'histogram_quantile(0.5, sum by (le, rank) (rate(hetis:a_bucket{model="x y"}[5m]))) / on (rank) b_total'
    assert names_in(query) == {"hetis:a_bucket", "b_total"}
    assert labels_in(query, "{{role}}") == {"le", "rank", "model", "role"}


def test_every_metric_of_the_fleet_is_shown(exported: Exported) -> None:
    """A metric that no panel shows is one that no user finds."""
    shown = {name for _, query, _ in queries() for name in names_in(query)}
    of_devices = {name for name in exported if name.startswith("hetis:device_")}
    assert of_devices
    assert of_devices <= shown


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & own, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
