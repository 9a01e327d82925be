"""The options of `hetis bench serve`, with vLLM's names where the meaning is the same, as `Settings`."""

import argparse
import json
import math
import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, get_args

from hetis.bench_serve.settings import (
    DEFAULT_NUM_PROMPTS,
    ENDPOINTS,
    GOALS,
    TITLES,
    Backend,
    Dataset,
    RampUp,
    Settings,
)
from hetis.cli.numbers import count, field_of

Group = argparse._ArgumentGroup


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    _add_server(parser.add_argument_group("server"))
    _add_workload(parser.add_argument_group("requests"))
    _add_arrivals(parser.add_argument_group("arrivals"))
    _add_figures(parser.add_argument_group("figures and files"))


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
    add("--port", type=_port, metavar="N", default=8000, help="port")
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
    number = f"most requests of a run; default: {DEFAULT_NUM_PROMPTS}, or rate times --duration"
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
    _number(group, "--burstiness", burst, metavar="SHAPE")
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


def _port(text: str) -> int:
    number = count(1)(text)
    if number >= 2**16:
        raise ArgumentTypeError(f"is {number}: it must be at most {2**16 - 1}.")
    return number


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
            raise ArgumentTypeError(f"is {text!r}: it must be some of {', '.join(TITLES)}.")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 100:
            raise ArgumentTypeError(f"is {text!r}: it must be numbers from 0 to 100, like 50,95,99.")
        found.append(value)
    return tuple(dict.fromkeys(found))


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOALS:
        raise ArgumentTypeError(f"is {text!r}: write METRIC:MS with one of {', '.join(GOALS)}.")
    return name, _positive(limit)


# --- settings ---------------------------------------------------------------------------------------------------------


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
