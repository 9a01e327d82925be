"""Percentiles of TTFT and TPOT against the request rate, as a picture."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from hetis.bench_serve.metrics import Result

PANELS = {"ttft": "time to first token, ms", "tpot": "time per output token, ms"}
STYLES = ("-", "--", ":", "-.")


def check_plot(path: Path, what: str) -> None:
    """Raises ValueError if matplotlib is missing or cannot write files of this kind."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib: pip install 'hetis[bench]'.")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{what} {path} must end in .png, .pdf or .svg.")


def rate_of(result: Result) -> float:
    """The rate asked for, or reached if the load was not given as a rate."""
    rate = result["request_rate"]
    return float(result["request_throughput"] if isinstance(rate, str) else rate)


def curves(results: Sequence[Result], metric: str) -> dict[str, list[tuple[float, float]]]:
    """(rate, milliseconds) in order of the rate, by "median", "p95" and so on: what the results have of `metric`."""
    pattern = re.compile(rf"(median|p[\d.]+)_{metric}_ms")
    names = sorted({found[1] for result in results for key in result if (found := pattern.fullmatch(key))})
    return {
        name: sorted((rate_of(one), float(one[key])) for one in results if (key := f"{name}_{metric}_ms") in one)
        for name in names
    }


def draw(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draws the results, by label, one colour each, into `path`. Raises ValueError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    for axis, (metric, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for number, (label, found) in enumerate(results.items()):
            for style, (name, points) in enumerate(curves(found, metric).items()):
                line = STYLES[style % len(STYLES)]
                text = f"{label} {name}" if len(results) > 1 else name
                axis.plot(*zip(*points, strict=True), f"o{line}", color=f"C{number}", label=text, markersize=4)
        axis.set(xlabel="requests per second", ylabel=title, yscale="log")
        axis.grid(visible=True, which="both", alpha=0.25)
        if axis.lines:
            axis.legend(fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written ({error.strerror}); name another file.") from None
