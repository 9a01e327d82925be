"""Command-line options that more than one command has, and what becomes of them."""

import argparse
from typing import Any, get_args, get_type_hints

from hetis.core.config import EngineConfig
from hetis.core.sampling_params import SamplingParams
from hetis.core.sizes import parse_bytes


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something; for the others the help text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `EngineConfig`, with vLLM's names where the meaning is the same."""
    group, default = parser.add_argument_group("engine"), EngineConfig()
    _add_model(group, default)
    _add_fleet(group, default)
    _add_sizes(group, default)
    _add_placement(group, default)


def _add_model(group: "argparse._ArgumentGroup", default: EngineConfig) -> None:
    add = group.add_argument
    add("model", nargs="?", help="directory or hub id; left out: the small model in the package")
    add("--revision", help="branch, tag or commit on the hub; left out: main")
    add("--tokenizer", help="directory or hub id of the tokenizer, if not the model's")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default=default.dtype, choices=dtypes, help="auto: the checkpoint's")
    formats = ("auto", "safetensors", "dummy")
    add("--load-format", default=default.load_format, choices=formats, help="dummy: random weights")
    add("--seed", type=int, default=default.seed, help="seed of requests that bring none, and of dummy weights")
    add("--enforce-eager", action="store_true", help="plain torch linears, for debugging")


def _add_fleet(group: "argparse._ArgumentGroup", default: EngineConfig) -> None:
    add = group.add_argument
    add("--plan", default=default.plan, help="P+A (primaries + attention workers) or a plan file (JSON)")
    devices = "device of every rank: cpu, cuda or auto; a plan file may say otherwise"
    add("--device", default=default.device, help=devices)
    silence = "seconds after which a silent rank counts as dead"
    add("--step-timeout", type=float, default=default.step_timeout, help=silence)
    more = "start more ranks than the memory and the cores of this host are good for"
    add("--oversubscribe", action="store_true", help=more)
    add("--trace", help="file for a trace of what every rank does, for ui.perfetto.dev")


def _add_sizes(group: "argparse._ArgumentGroup", default: EngineConfig) -> None:
    add = group.add_argument
    add("--max-model-len", type=int, help="longest sequence; left out: what the model and the memory allow")
    add("--max-num-seqs", type=int, default=default.max_num_seqs, help="sequences running at once")
    add("--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens, help="tokens in one step")
    add("--block-size", type=int, default=default.block_size, help="tokens per cache page")
    memory = "cache per rank, like 2GiB, or 0=1GiB,1=4GiB; left out: from free memory"
    add("--kv-cache-memory", type=_memory, help=memory)
    logprobs = "most logprobs a request may ask for; -1: no limit"
    add("--max-logprobs", type=int, default=default.max_logprobs, help=logprobs)


def _add_placement(group: "argparse._ArgumentGroup", default: EngineConfig) -> None:
    add = group.add_argument
    policies = get_args(get_type_hints(EngineConfig)["dispatch"])
    how = (
        "how heads are placed: by measured speeds (hetis; highs: the same, solved by HiGHS), by free memory "
        "(proportional), evenly, or on primaries alone"
    )
    add("--dispatch", default=default.dispatch, choices=policies, help=how)
    imbalance = "imbalance of attention at which heads move, as a share of the ideal"
    add("--theta", type=float, default=default.theta, help=imbalance)
    budget = "bytes of heads per second that may move for balance; 0: none"
    add("--migration-budget", type=_budget, default=default.migration_budget, help=budget)
    add("--profile", metavar="FILE", help="speeds from `hetis profile`; left out: from the cache, or measured now")
    anew = "measure every rank anew, each by itself, and keep nothing"
    add("--no-profile-cache", dest="profile_cache", action="store_false", help=anew)


def add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int, temperature: float) -> None:
    default = SamplingParams()
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--max-tokens", type=int, default=max_tokens, help="new tokens per prompt")
    add("--temperature", type=float, default=temperature, help="0: the most likely token")
    add("--top-p", type=float, default=default.top_p, help="smallest set of tokens with this probability; 1: all")
    add("--top-k", type=int, default=default.top_k, help="0: all")
    add("--min-p", type=float, default=default.min_p, help="least probability, as a share of the best token's; 0: all")
    add("--repetition-penalty", type=float, default=default.repetition_penalty, help="of tokens seen; 1: none")
    add("--sampling-seed", type=int, help="of every request; left out: each its own, made from --seed")
    add("--ignore-eos", action="store_true", help="go on after the model's end of sequence")


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM`, from parsed options."""
    names = (
        "model", "revision", "tokenizer", "plan", "device", "dtype", "load_format", "max_model_len", "max_num_seqs",
        "max_num_batched_tokens", "block_size", "kv_cache_memory", "profile", "profile_cache", "seed", "enforce_eager",
        "max_logprobs", "step_timeout", "dispatch", "theta", "migration_budget", "trace", "oversubscribe",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names} | {"measure": options.command == "profile"}


def sampling_params(options: argparse.Namespace) -> SamplingParams:
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


def _budget(text: str) -> int:
    if text.strip() == "0":
        return 0
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _memory(text: str) -> int | dict[int, int]:
    try:
        if "=" not in text:
            return parse_bytes(text)
        pairs = (part.split("=", 1) for part in text.split(","))
        return {int(rank): parse_bytes(size) for rank, size in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
