"""`hetis bench serve`: measures an OpenAI-compatible server under load. `hetis bench plot`: results as a picture.

JSON with vLLM's key names goes to standard output, tables of the same figures to standard error.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetis.cli.bench_serve_options import add_options, settings_of
from hetis.core.files import check_writable, unwritable
from hetis.frontend.console import write, write_message

SERVE_TEXT = "measure an OpenAI-compatible server: latencies and throughput at one or several request rates"
PLOT_TEXT = "draw results of `hetis bench serve` against the request rate, several files in one picture"
SERVE_EXAMPLES = """examples:
  hetis bench serve --input-len 256 --output-len 64 --num-prompts 100 --request-rate 4
  hetis bench serve --request-rate 1,2,4,8 --duration 60 --goodput ttft:500 tpot:50 --save-result --plot rates.png
  hetis bench serve --base-url http://gpu:8000 --backend openai-chat --max-concurrency 16 --num-prompts 200
  hetis bench serve --dataset-name shared-prefix --prefix-len 1000 --num-prefixes 4 --input-len 100
  hetis bench serve --dataset-name trace --dataset-path trace.csv --trace-scale 0.25 --num-prompts 500
"""
PLOT_EXAMPLES = """examples:
  hetis bench plot ours.json theirs.json --output comparison.png
"""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hetis bench serve`."""
    add_options(parser)
    parser.set_defaults(run=run_serve)


def run_serve(options: argparse.Namespace) -> int:
    """Runs `hetis bench serve`. Returns 1 if a request failed."""
    import uvloop

    from hetis.bench_serve.benchmark import benchmark
    from hetis.bench_serve.report import comparison, one_table, remarks, without_details

    settings, results = settings_of(options), []
    _check_files(options)

    def show(result: dict[str, Any]) -> None:
        results.append(result | {"label": options.label, **dict(options.metadata)})
        write_message(f"\n{one_table(result, settings.metrics, settings.percentiles)}\n")
        for line in remarks(result):
            write_message(f"hetis: {line}")

    uvloop.run(benchmark(settings, show))
    if len(results) > 1:
        write_message(f"\n{comparison(results, settings.metrics, settings.percentiles)}\n")
    short = [without_details(result) for result in results]
    write(json.dumps(short if len(short) > 1 else short[0], indent=2) + "\n")
    _save(options, results)
    return int(any(result["failed"] for result in results))


def _check_files(options: argparse.Namespace) -> None:
    """Raises ValueError before the measurement for files that cannot be written after it."""
    from hetis.bench_serve.plot import check_plot

    if options.plot is not None:
        check_plot(options.plot, "--plot")
        check_writable(options.plot, "--plot")
    if _is_saved(options):
        try:
            options.result_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(options.result_dir, "--result-dir", error) from error
        probe = options.result_filename or ".hetis-bench"
        check_writable(options.result_dir / probe, "--result-filename" if options.result_filename else "--result-dir")


def _is_saved(options: argparse.Namespace) -> bool:
    return bool(options.save_result or options.save_detailed or options.append_result)


def _save(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    from hetis.bench_serve.plot import draw
    from hetis.bench_serve.report import file_name, lines_of, without_details

    if _is_saved(options):
        name = options.result_filename or file_name(results, options.label)
        path = options.result_dir / name
        text = lines_of(results if options.save_detailed else [without_details(result) for result in results])
        try:
            with path.open("a" if options.append_result else "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise unwritable(path, "--result-filename", error) from error
        write_message(f"hetis: results are in {path}")
    if options.plot is not None:
        draw({options.label or str(results[0]["model_id"]): results}, options.plot)
        write_message(f"hetis: the plot is in {options.plot}")


# --- plot -------------------------------------------------------------------------------------------------------------


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hetis bench plot`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result files; one colour each")
    output = "picture to write (.png, .pdf, .svg)"
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("bench.png"), help=output)
    parser.set_defaults(run=run_plot)


def run_plot(options: argparse.Namespace) -> None:
    """Runs `hetis bench plot`."""
    from hetis.bench_serve.plot import check_plot, draw
    from hetis.bench_serve.report import read_results

    check_plot(options.output, "--output")
    check_writable(options.output, "--output", map(str, options.files))
    results = {}
    for path in options.files:
        found = read_results(path)
        label = found[0].get("label") or path.stem
        results[str(path) if label in results else label] = found
    draw(results, options.output)
