"""Command-line options that several commands share, and their conversion to `EngineConfig` and `SamplingParams`."""

import argparse
from typing import Any, get_args, get_type_hints

from hetis.cli.config_file import add_config_argument
from hetis.cli.numbers import field_of, size_or_none, sizes_of_ranks
from hetis.core.config import EngineConfig
from hetis.core.logs import LEVELS, level_of_environment
from hetis.core.sampling_params import SamplingParams
from hetis.frontend.options import make_config

Group = argparse._ArgumentGroup


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `EngineConfig`, with vLLM's names where the meaning is the same."""
    default = EngineConfig()
    parser.usage = f"{parser.prog} [options] [MODEL]"
    _add_model(parser, default)
    _add_fleet(parser.add_argument_group("devices"), default)
    _add_sizes(parser.add_argument_group("memory and limits"), default)
    _add_placement(parser.add_argument_group("placement of attention heads on devices"), default)
    _add_messages(parser.add_argument_group("messages"))
    add_config_argument(parser.add_argument_group("options from a file"))


def _choices(field: str) -> tuple[str, ...]:
    """The allowed values of a field of `EngineConfig`."""
    return get_args(get_type_hints(EngineConfig)[field])


def _add_model(parser: argparse.ArgumentParser, default: EngineConfig) -> None:
    model = "directory or Hugging Face id of the model; default: the small model in the package"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model)
    add = parser.add_argument_group("model").add_argument
    add("--revision", help="branch, tag or commit on the Hugging Face hub; default: main")
    add("--tokenizer", metavar="NAME", help="directory or Hugging Face id of the tokenizer; default: that of the model")
    dtype = "of weights, activations and KV cache; auto: as in the checkpoint"
    add("--dtype", default=default.dtype, choices=_choices("dtype"), help=dtype)
    load = "auto, safetensors: read the checkpoint; dummy: random weights"
    add("--load-format", default=default.load_format, choices=_choices("load_format"), help=load)
    seed = "random seed for requests without a seed, and for dummy weights"
    add("--seed", type=field_of(EngineConfig, "seed", int), metavar="N", default=default.seed, help=seed)
    eager = "compute linear layers with plain torch, not with hetis's kernels; slower, for debugging"
    add("--enforce-eager", action="store_true", help=eager)


def _add_fleet(group: Group, default: EngineConfig) -> None:
    add = group.add_argument
    plan = "P+A: P primaries (hold the weights) and A attention workers (hold KV cache only); or a plan file (JSON)"
    add("--plan", default=default.plan, help=plan)
    devices = "device of each rank: cpu, cuda, cuda:N, or auto (a GPU if there is one); unless the plan file names one"
    add("--device", default=default.device, help=devices)
    timeout = "seconds without an answer after which a rank counts as failed"
    timeout_type = field_of(EngineConfig, "step_timeout", float)
    add("--step-timeout", type=timeout_type, metavar="SECONDS", default=default.step_timeout, help=timeout)
    more = "start more ranks than this host has memory and cores for"
    add("--oversubscribe", action="store_true", help=more)
    ahead = "schedule a step when the one before has come back, not while it runs"
    add("--no-async-scheduling", dest="async_scheduling", action="store_false", help=ahead)
    trace = "write a trace of every rank's activities to FILE, for ui.perfetto.dev"
    add("--trace", metavar="FILE", help=trace)


def _add_sizes(group: Group, default: EngineConfig) -> None:
    def add(name: str, text: str) -> None:
        field = name.removeprefix("--").replace("-", "_")
        number = field_of(EngineConfig, field, int)
        group.add_argument(name, type=number, metavar="N", default=getattr(default, field), help=text)

    add("--max-model-len", "most tokens of a prompt and its output; default: what the model and the memory allow")
    add("--max-num-seqs", "most sequences that run at once; others wait")
    add("--max-num-batched-tokens", "most tokens computed at once, in all pipeline stages together")
    add("--block-size", "tokens in a page of the KV cache")
    memory = "KV cache of every rank, like 2GiB, or by rank, like 0=1GiB,1=4GiB; default: from free memory"
    group.add_argument("--kv-cache-memory", type=sizes_of_ranks, metavar="SIZE", help=memory)
    add("--max-logprobs", "most log-probabilities per token that a request may ask for; -1: no limit")


def _add_placement(group: Group, default: EngineConfig) -> None:
    add = group.add_argument
    how = (
        "which device gets which head: by measured speed (hetis), by free memory (proportional), the same number each "
        "(even), or none outside the primaries (primary-only)"
    )
    add("--dispatch", default=default.dispatch, choices=_choices("dispatch"), help=how)
    imbalance = "hysteresis threshold: migrate heads if the slowest device exceeds the ideal time by this fraction"
    add("--theta", type=field_of(EngineConfig, "theta", float), metavar="X", default=default.theta, help=imbalance)
    budget = "most bytes of KV cache per second that migrate to balance the fleet, like 256MiB; 0: none"
    megabytes = f"{default.migration_budget >> 20}MiB"
    add("--migration-budget", type=size_or_none, metavar="SIZE", default=megabytes, help=budget)
    profile = "device speeds from `hetis profile --output FILE`; default: from earlier starts, or measured now"
    add("--profile", metavar="FILE", help=profile)
    anew = "measure the speed of every rank anew and by itself, and keep nothing for later starts"
    add("--no-profile-cache", dest="profile_cache", action="store_false", help=anew)


def _add_messages(group: Group) -> None:
    level = "lowest level of messages on stderr"
    group.add_argument("--log-level", default=level_of_environment() or "info", choices=LEVELS, help=level)
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars on terminals")


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int, temperature: float) -> None:
    """Adds the options of `SamplingParams`, with these defaults."""
    group, default = parser.add_argument_group("sampling"), SamplingParams()

    def add(name: str, text: str, kind: type[int] | type[float], value: float | None, field: str = "") -> None:
        number = field_of(SamplingParams, field or name.removeprefix("--").replace("-", "_"), kind)
        group.add_argument(name, type=number, metavar="N" if kind is int else "X", default=value, help=text)

    add("--max-tokens", "most tokens of each output", int, max_tokens)
    add("--temperature", "divides logits; 0: greedy, always the most likely token", float, temperature)
    add("--top-p", "sample from the fewest tokens whose probabilities add up to this; 1: all", float, default.top_p)
    add("--top-k", "sample from this many most likely tokens; 0: all", int, default.top_k)
    add("--min-p", "sample from tokens of at least this fraction of the best probability; 0: all", float, default.min_p)
    penalty = "above 1: makes tokens of the prompt and the output less likely; 1: off"
    add("--repetition-penalty", penalty, float, default.repetition_penalty)
    add("--sampling-seed", "random seed of every prompt; default: different ones, from --seed", int, None, "seed")
    go_on = "continue after the model's end-of-sequence token"
    group.add_argument("--ignore-eos", action="store_true", help=go_on)


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM` from parsed options."""
    names = {*EngineConfig.__struct_fields__} & {*vars(options)}
    return {name: getattr(options, name) for name in sorted(names)}


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The configuration from parsed options. Raises ValueError for options that do not fit together."""
    return make_config(**engine_arguments(options))


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The sampling parameters from parsed options."""
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.sampling_seed,
        ignore_eos=options.ignore_eos,
    )
