"""`hetis bench serve`: measures an OpenAI-compatible server under load. `hetis bench plot`: results as a picture.

JSON with vLLM's key names goes to standard output, tables of the same figures to standard error.
"""

import argparse
import json
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hetis.bench_serve.settings import ENDPOINTS, GOALS, TITLES, Backend, Dataset, RampUp, Settings
from hetis.cli.numbers import count, field_of
from hetis.core.files import check_writable, unwritable
from hetis.frontend.console import write, write_message

Group = argparse._ArgumentGroup
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
    """Adds the options of `hetis bench serve`, with vLLM's names where the meaning is the same."""
    _add_server(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("requests"))
    _add_arrivals(parser.add_argument_group("arrivals"))
    _add_figures(parser.add_argument_group("figures and files"))
    parser.set_defaults(run=run_serve)


def _number(group: Group, name: str, text: str, kind: type[int] | type[float] = float, **more: Any) -> None:
    """Adds an option whose limits are those of the field of `Settings` with its name."""
    field = name.removeprefix("--").replace("-", "_")
    default = getattr(Settings(), field)
    letter = "N" if kind is int else more.pop("metavar", "X")
    group.add_argument(name, type=field_of(Settings, field, kind), metavar=letter, default=default, help=text)


def _add_server(group: Group) -> None:
    add, default = group.add_argument, Settings()
    add("--base-url", metavar="URL", help="address of the server, with or without /v1; default: --host and --port")
    add("--host", default="127.0.0.1", help="host name or address")
    add("--port", type=count(1), metavar="N", default=8000, help="port")
    backend = "completions or chat completions"
    add("--backend", default=default.backend, choices=get_args(Backend), help=backend)
    add("--endpoint", metavar="PATH", help="path of the requests; default: /v1/completions or /v1/chat/completions")
    # not `model`: options with a model start a fleet
    add("--model", dest="model_name", metavar="NAME", help="name of the model; default: the first of /v1/models")
    tokenizer = (
        "directory or Hugging Face id of the tokenizer that makes prompts; default: the root of the model that the "
        "server names, if it is a directory here, else token ids, else the server's /tokenize"
    )
    add("--tokenizer", metavar="NAME", help=tokenizer)
    add("--api-key", metavar="KEY", help="key of the server; default: OPENAI_API_KEY of the environment")
    add("--header", metavar="KEY=VALUE", nargs="+", type=_pair, default=[], help="further headers of all requests")
    insecure = "accept any certificate of an https server; else those of the system, or of SSL_CERT_FILE"
    add("--insecure", action="store_true", help=insecure)
    ready = "seconds to wait until the server is ready; 0: it must be ready now"
    _number(group, "--ready-check-timeout-sec", ready, metavar="SECONDS")
    _number(group, "--request-timeout", "seconds after which a request counts as failed", metavar="SECONDS")


def _add_workload(group: Group) -> None:
    add, default = group.add_argument, Settings()
    dataset = "random: random tokens; shared-prefix: with common beginnings; trace: lengths and times of a file"
    add("--dataset-name", default=default.dataset_name, choices=get_args(Dataset), help=dataset)
    trace = "trace: CSV file with columns TIMESTAMP, ContextTokens and GeneratedTokens"
    add("--dataset-path", metavar="FILE", help=trace)
    number = "most requests of a run; default: 1000, or rate times duration"
    add("--num-prompts", type=count(1), metavar="N", help=number)
    _number(
        group, "--duration", "seconds after which no request is sent any more; default: no limit", metavar="SECONDS"
    )
    add("--input-len", type=count(1), metavar="N", default=default.input_len, help="tokens of each prompt")
    add("--output-len", type=count(1), metavar="N", default=default.output_len, help="tokens of each output")
    spread = "draw lengths uniformly between length * (1 - X) and length * (1 + X)"
    _number(group, "--range-ratio", spread)
    add("--prefix-len", type=count(1), metavar="N", default=default.prefix_len, help="tokens of a shared prefix")
    add("--num-prefixes", type=count(1), metavar="N", default=default.num_prefixes, help="number of shared prefixes")
    _number(group, "--trace-scale", "factor of the lengths in the trace")
    _number(group, "--trace-speed", "factor of the speed at which the trace's time passes")
    seed = "random seed of lengths, prompts and arrivals; each rate has prompts of its own"
    _number(group, "--seed", seed, int)
    eos = "ask the server to continue until the output length; --no-ignore-eos for servers that refuse the field"
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help=eos)
    body = 'further fields of all requests, like {"temperature": 0}'
    add("--extra-body", metavar="JSON", type=_json_object, default={}, help=body)


def _add_arrivals(group: Group) -> None:
    add = group.add_argument
    rate = (
        "requests per second; inf: all at once; several, like 1,2,4,8: one run after the other; default: inf, or the "
        "times of the trace"
    )
    add("--request-rate", type=_rates, metavar="RATES", help=rate)
    burst = "shape of the gamma distribution of gaps: 1 is a Poisson process, less more bursty, inf constant"
    _number(group, "--burstiness", burst)
    limit = "most requests at once; others wait in this client, which is reported"
    add("--max-concurrency", type=count(1), metavar="N", help=limit)
    ramp = "let the rate grow over the run instead, from --ramp-up-start-rps to --ramp-up-end-rps"
    add("--ramp-up-strategy", choices=("linear", "exponential"), help=ramp)
    add("--ramp-up-start-rps", type=_positive, metavar="X", help="requests per second at the start of the run")
    add("--ramp-up-end-rps", type=_positive, metavar="X", help="requests per second at its end")
    warm = "requests sent before the measurement, with prompts of their own"
    add("--num-warmups", type=count(0), metavar="N", default=0, help=warm)


def _add_figures(group: Group) -> None:
    add, default = group.add_argument, Settings()
    names = f"metrics to report, of {', '.join(TITLES)}"
    add("--percentile-metrics", type=_metrics, metavar="NAMES", default=",".join(default.metrics), help=names)
    add("--metric-percentiles", type=_percentiles, metavar="NUMBERS", default="99", help="percentiles, like 50,95,99")
    goals = f"limits in milliseconds of {', '.join(GOALS)} for requests that count in request_goodput"
    add("--goodput", metavar="METRIC:MS", nargs="+", type=_goal, default=[], help=goals)
    add("--save-result", action="store_true", help="write the JSON to a file, one line per rate")
    add("--save-detailed", action="store_true", help="with the times, lengths and texts of every request")
    add("--append-result", action="store_true", help="append to the file")
    add("--result-dir", type=Path, metavar="DIR", default=Path(), help="directory of the file")
    name = "name of the file; default: from backend, rates, model and date"
    add("--result-filename", metavar="NAME", help=name)
    add("--label", metavar="TEXT", help="begins the name of the file and names the curves of a plot")
    add("--metadata", metavar="KEY=VALUE", nargs="+", type=_pair, default=[], help="further keys of the result")
    plot = "draw TTFT and TPOT against the rate into FILE (.png, .pdf, .svg); needs matplotlib"
    add("--plot", type=Path, metavar="FILE", help=plot)
    add("--no-progress", dest="progress", action="store_false", help="no progress bars on terminals")


# --- types of options -------------------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (sign and key.strip()):
        raise ArgumentTypeError(f"is {text!r}: write KEY=VALUE.")
    return key.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f'is {text!r}: it must be a JSON object, like {{"temperature": 0}}.')
    return found


def _positive(text: str, *, may_be_infinite: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or (math.isinf(value) and not may_be_infinite):
        raise ArgumentTypeError(f"is {text!r}: it must be a number above 0{' or inf' if may_be_infinite else ''}.")
    return value


def _rates(text: str) -> tuple[float, ...]:
    return tuple(_positive(part, may_be_infinite=True) for part in text.split(","))


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in TITLES:
            raise ArgumentTypeError(f"has {name!r}: it must be some of {', '.join(TITLES)}.")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise ArgumentTypeError(f"has {part!r}: it must be numbers from 0 to 100, like 50,95,99.")
        found.append(value)
    return tuple(dict.fromkeys(found))


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOALS:
        raise ArgumentTypeError(f"is {text!r}: write METRIC:MS with one of {', '.join(GOALS)}.")
    return name, _positive(limit)


# --- run --------------------------------------------------------------------------------------------------------------


def run_serve(options: argparse.Namespace) -> int:
    """Runs `hetis bench serve`. Returns 1 if a request failed."""
    import uvloop

    from hetis.bench_serve.benchmark import benchmark
    from hetis.bench_serve.report import comparison, one_table, remarks, without_details

    settings = settings_of(options)
    _check_files(options)
    results = uvloop.run(benchmark(settings))
    for result in results:
        result |= {"label": options.label, **dict(options.metadata)}
        write_message(f"\n{one_table(result, settings.metrics, settings.percentiles)}\n")
        for line in remarks(result):
            write_message(f"hetis: {line}")
    if len(results) > 1:
        write_message(f"\n{comparison(results, settings.metrics, settings.percentiles)}\n")
    _save(options, results)
    short = [without_details(result) for result in results]
    write(json.dumps(short if len(short) > 1 else short[0], indent=2) + "\n")
    return int(any(result["failed"] for result in results))


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings from parsed options. Raises ValueError for options that do not fit together."""
    chosen = {name: value for name, value in vars(options).items() if name in Settings.__struct_fields__}
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    host = f"[{options.host}]" if ":" in options.host else options.host
    is_trace = options.dataset_name == "trace"
    if is_trace != (options.dataset_path is not None):
        raise ValueError("--dataset-name trace and --dataset-path FILE belong together; give both or none.")
    chosen |= {
        "base_url": options.base_url or f"http://{host}:{options.port}",
        "endpoint": options.endpoint or ENDPOINTS[options.backend],
        "headers": ({"authorization": f"Bearer {key}"} if key else {})
        | {name.lower(): value for name, value in options.header},
        "request_rates": options.request_rate or (() if is_trace else (math.inf,)),
        "ramp_up": _ramp(options),
        "metrics": options.percentile_metrics,
        "percentiles": options.metric_percentiles,
        "goodput": dict(options.goodput),
        "show_progress": options.progress,
    }
    return Settings(**chosen)


def _ramp(options: argparse.Namespace) -> RampUp | None:
    strategy, start, end = options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps
    if strategy is None and start is None and end is None:
        return None
    if strategy is None or start is None or end is None:
        raise ValueError("--ramp-up-strategy, -start-rps and -end-rps belong together; give all three or none.")
    if options.request_rate is not None:
        raise ValueError("--ramp-up-strategy and --request-rate exclude each other: the ramp sets the rate.")
    if start > end:
        raise ValueError(f"--ramp-up-start-rps is {start:g}, above --ramp-up-end-rps {end:g}; exchange them.")
    return RampUp(strategy, start, end)


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
