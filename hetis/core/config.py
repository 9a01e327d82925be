"""One frozen configuration, as the user gave it; "auto" values are resolved once, at start, into `Setup`."""

from math import isfinite
from typing import Any, Literal

import msgspec

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan

LARGEST_COUNT = 2**31 - 1
LONGEST_TIMEOUT = 1_000_000  # seconds; systems count milliseconds in 31 bits


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Names are vLLM's where the meaning is the same."""

    model: str | None = None  # directory or hub id; None: the small model in the package
    revision: str | None = None  # branch, tag or commit of a model on the hub
    tokenizer: str | None = None  # directory or hub id; None: the model's
    plan: str | dict[str, Any] = "1+0"  # "P+A", the path of a plan file, or what stands in one
    device: str = "auto"  # "cpu", "cuda", "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    max_model_len: int | None = None  # None: what the model and the memory allow
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32  # tokens per page; measured in bench/bench_cpu_attention.py
    kv_cache_memory: int | dict[int, int] | None = None  # bytes per rank, or by rank; None: from free memory
    seed: int = 0
    enforce_eager: bool = False  # plain torch linears: for debugging
    max_logprobs: int = 20  # -1: no limit
    logprobs_mode: Literal["raw_logprobs", "raw_logits"] = "raw_logprobs"
    dispatch: Literal["hetis", "highs", "proportional", "even", "primary-only"] = "hetis"
    theta: float = 0.5  # lanes move when the slowest device exceeds the lower bound by this fraction
    migration_budget: int = 256 << 20  # bytes of lanes per second that may move to balance the fleet
    profile: str | None = None  # file of a FleetProfile; None: measured at start where there are attention workers
    profile_cache: bool = True  # False: every rank is measured anew and by itself, and nothing is kept
    trace: str | None = None  # file for a Chrome trace of what every rank does
    step_timeout: float = 60.0  # seconds without a sign of life before a rank counts as dead
    oversubscribe: bool = False  # start more ranks than the host has room for
    progress: bool = True  # bars on terminals while the fleet starts

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len", "max_logprobs"):
            if (getattr(self, name) or 0) > LARGEST_COUNT:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at most {LARGEST_COUNT}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be a 64-bit integer.")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}: it must be at least 1, or left out.")
        if not 1 <= self.step_timeout <= LONGEST_TIMEOUT:  # ranks beat four times a second; NaN fails too
            raise ValueError(
                f"step_timeout is {self.step_timeout}: it must be a number of seconds from 1 to {LONGEST_TIMEOUT}."
            )
        if not (isfinite(self.theta) and self.theta > 0):
            raise ValueError(f"theta is {self.theta}: it must be a positive number, like 0.5.")
        if self.migration_budget < 0:
            raise ValueError(f"migration_budget is {self.migration_budget}: it must be 0 (never) or more bytes/s.")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs is {self.max_logprobs}: it must be -1 (no limit) or at least 0.")


class DriverArgs(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 hands to the driver it starts."""

    config: EngineConfig
    measure: bool = False  # every device and link anew, also where placement does not depend on it: `hetis profile`
    spec: ModelSpec
    plan: Plan
    eos_token_ids: list[int]
    run_directory: str  # private directory for unix sockets
    address: str | None  # address to bind for ranks on other hosts; None: unix sockets only
    announce: bool  # print the reason of a failure: under torchrun no front end reads it
    parent: int  # pid of rank 0


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank must know to join: where the driver listens, and its device ("auto": the rank's choice)."""

    endpoints: "Endpoints"
    devices: list[str]  # by rank


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where the driver listens."""

    ranks: str
    health: str
    front: str
