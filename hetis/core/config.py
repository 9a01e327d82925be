"""The configuration of a fleet as the user gave it; "auto" values are resolved once, at start, into `Setup`."""

from math import isfinite
from typing import Any, Literal

import msgspec

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan

LARGEST_COUNT = 2**31 - 1
LONGEST_TIMEOUT = 1_000_000  # seconds; operating systems count milliseconds in 31 bits


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a fleet. `help(hetis.LLM)` lists their meanings and defaults.

    Raises ValueError for a number out of range. Types and choices are checked by `hetis.frontend.options`.
    """

    model: str | None = None  # None: the small model in the package
    revision: str | None = None
    tokenizer: str | None = None  # None: that of the model
    plan: str | dict[str, Any] = "1+0"  # "P+A", a path, or the content of a plan file
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    max_model_len: int | None = None  # None: what the model and the memory allow
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32  # tokens per page; measured in bench/bench_cpu_attention.py
    kv_cache_memory: int | dict[int, int] | None = None  # bytes for every rank, or by rank; None: from free memory
    seed: int = 0
    enforce_eager: bool = False
    async_scheduling: bool = True  # the next step is scheduled while one runs; plans of one stage only
    max_logprobs: int = 20  # -1: no limit
    logprobs_mode: Literal["raw_logprobs", "raw_logits"] = "raw_logprobs"
    dispatch: Literal["hetis", "proportional", "even", "primary-only"] = "hetis"
    theta: float = 0.5  # hysteresis threshold: lanes migrate when the makespan exceeds its lower bound by this fraction
    migration_budget: int = 256 << 20  # bytes of lanes per second that may migrate to balance the fleet
    profile: str | None = None  # file of a FleetProfile; None: measured at start where there are attention workers
    profile_cache: bool = True  # False: every rank is measured anew and by itself, and nothing is kept
    trace: str | None = None  # file for a Chrome trace of what every rank does
    step_timeout: float = 60.0  # seconds without an answer after which a rank counts as failed
    oversubscribe: bool = False  # start more ranks than the host has memory and cores for
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
        if not 1 <= self.step_timeout <= LONGEST_TIMEOUT:  # four heartbeats a second; NaN fails too
            raise ValueError(
                f"step_timeout is {self.step_timeout}: it must be a number of seconds from 1 to {LONGEST_TIMEOUT}."
            )
        if not (isfinite(self.theta) and self.theta > 0):
            raise ValueError(f"theta is {self.theta}: it must be a positive number, like 0.5.")
        if self.migration_budget < 0:
            raise ValueError(f"migration_budget is {self.migration_budget}: it must be 0 (never) or more bytes/s.")
        if self.max_logprobs < -1:
            raise ValueError(f"max_logprobs is {self.max_logprobs}: it must be -1 (no limit) or at least 0.")


JOB = "job.json"  # file of the run directory with the `DriverArgs`


class DriverArgs(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet as its root has resolved it: input of its agent and of the driver."""

    config: EngineConfig
    measure: bool = False  # every device and link anew, also where placement does not depend on it: `hetis profile`
    spec: ModelSpec
    plan: Plan
    eos_token_ids: list[int]
    run_directory: str  # private directory of the unix sockets
    address: str | None  # to bind for ranks on other hosts; None: unix sockets only


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver says when it listens: its endpoints, and the device of each rank ("auto": the rank chooses)."""

    endpoints: "Endpoints"
    devices: list[str]  # by rank


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses on which the driver listens."""

    ranks: str
    health: str
    board: str
    agents: str
    front: str
