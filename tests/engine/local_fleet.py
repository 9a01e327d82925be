"""A fleet in one process: the engine, and a thread per rank, connected by in-process links.

The objects are those of production without processes and sockets, so that a test starts within milliseconds.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from hetis.comm.rendezvous import LocalRendezvous
from hetis.core.config import EngineConfig
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import AddRequest, Setup, StepCommand, StepResult, StepTimes, TokenOutput
from hetis.core.messages.step_command import decode
from hetis.core.placement import Dispatcher, FleetView, Placement
from hetis.core.plan_sources import resolve_plan
from hetis.core.profile import (
    AttentionProfile,
    DenseProfile,
    DeviceProfile,
    FleetProfile,
    LayerProfile,
    LayerShare,
    LinkProfile,
    PrefillProfile,
    TransferProfile,
)
from hetis.core.request import Sequence as EngineSequence
from hetis.core.sampling_params import SamplingParams
from hetis.core.token_logprobs import TokenLogprobs
from hetis.driver.profiling import layer_share, profile_key
from hetis.engine.engine import Engine
from hetis.engine.policies import Policies, make_policies
from hetis.engine.setup import make_setup
from hetis.frontend.requests import resolve_seeds
from hetis.models.families import read_model_spec
from hetis.models.weight_files import with_own_head
from hetis.ranks.build import describe_device
from hetis.ranks.gpus import sum_in_float32
from hetis.ranks.rank import build_member
from tests.processes.look import DEADLINE

GIB = 1 << 30
# of fleets for which the test names none; set by the fixtures `device` and `depth`
default_device, default_async_scheduling = "cpu", True


class Generated:
    """Outputs for one prompt."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.rows: list[TokenLogprobs | None] = []
        self.prompt_rows: list[TokenLogprobs | None] = []
        self.finish_reason: str | None = None
        self.error: str | None = None

    def logits(self, vocab_size: int) -> torch.Tensor:
        """float32 [tokens, V], if log-probabilities of the whole vocabulary were requested."""
        return torch.stack([full_row(row, vocab_size) for row in self.rows if row is not None])


def full_row(row: TokenLogprobs, vocab_size: int) -> torch.Tensor:
    """float32 [V]: the values of the whole vocabulary in order of token id."""
    values = torch.empty(vocab_size)
    ids = np.frombuffer(row.token_ids, dtype=np.int32)[1:].astype(np.int64)
    values[torch.from_numpy(ids)] = torch.from_numpy(np.frombuffer(row.values, dtype=np.float32)[1:].copy())
    return values


class LocalFleet:
    """A fleet of all ranks of `plan` for the checkpoint in `directory`; a context manager."""

    def __init__(
        self,
        directory: Path,
        plan: str = "1+0",
        *,
        dispatcher: Dispatcher | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        """`clock`: seconds, for what the engine does at intervals."""
        options.setdefault("device", default_device)
        options.setdefault("async_scheduling", default_async_scheduling)
        options.setdefault("kv_cache_memory", 4 << 20)
        config = EngineConfig(model=str(directory), plan=plan, max_logprobs=-1, **options)
        spec = read_model_spec(directory)
        if config.load_format != "dummy":
            spec = with_own_head(spec, directory)
        resolved = resolve_plan(config.plan, spec, config.device, config.kv_cache_memory)
        self._devices = [torch.device(member.device) for member in resolved.members]
        sum_in_float32()
        fleet = [_device(rank, device) for rank, device in enumerate(self._devices)]
        self.setup, self.ledger = make_setup(config, spec, resolved, fleet, eos_token_ids=[])
        policies = Policies(dispatcher) if dispatcher else make_policies(config, self.setup, flat_profile(self.setup))
        depth = int(config.async_scheduling)
        self.engine, self._clock = Engine(self.setup, policies, config.migration_budget, depth=depth), clock
        self._commands: list[queue.SimpleQueue[StepCommand | None]] = [queue.SimpleQueue() for _ in fleet]
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self.times: queue.SimpleQueue[StepTimes] = queue.SimpleQueue()
        rendezvous = LocalRendezvous()
        self._threads = [
            threading.Thread(target=self._rank, args=(info.rank, self.setup, rendezvous), daemon=True) for info in fleet
        ]
        for thread in self._threads:
            thread.start()
        self._next_id = 0
        self.most_in_flight = 0

    def _rank(self, rank: int, setup: Setup, rendezvous: LocalRendezvous) -> None:
        try:
            torch.set_grad_enabled(False)
            member = build_member(setup, rank, self._devices[rank], rendezvous, self._results.put)
            while (command := self._commands[rank].get()) is not None:
                result = member.run_step(decode(command, rank))
                if result is not None:
                    self._results.put(result)
                for times in member.take_times():
                    self.times.put(times)
            member.close()
        except BaseException as error:
            self._results.put(error)

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        outputs: Sequence[list[int]] | None = None,
        check: bool = False,
    ) -> list[Generated]:
        """Runs all prompts together to their end. `outputs`: so far; None: none. `check`: check the integrity of the
        cache after every step."""
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        found: dict[str, Generated] = {}
        for prompt, each, output in zip(prompts, many, outputs or [[]] * len(prompts), strict=True):
            found[str(self._next_id)] = Generated()
            self.engine.add(self.request(str(self._next_id), prompt, each, output), self._clock())
            self._next_id += 1
        while any(one.finish_reason is None for one in found.values()):
            self.turn(check=check)
            for new in self.engine.take_outputs():
                _collect(found[new.id], new)
        return list(found.values())

    def request(self, name: str, prompt: list[int], params: SamplingParams, output: Sequence[int] = ()) -> AddRequest:
        """A sequence with its output so far. Without a seed of its own it gets one by its number in this fleet."""
        seed = resolve_seeds(params, self.setup.seed, count(self._next_id))[0]
        tokens = [*prompt, *output]
        return AddRequest(id=name, token_ids=tokens, prompt_len=len(prompt), seed=seed, params=params)

    def turn(self, *, check: bool = False) -> None:
        """Sends every step that can start, then takes one result."""
        while (command := self.engine.step(self._clock())) is not None:
            for commands in self._commands:
                commands.put(command)
        self.most_in_flight = max(self.most_in_flight, self.engine.num_in_flight)
        if self.engine.num_in_flight:
            self._receive()
        while not self.times.empty():
            self.engine.on_times(self.times.get())
        if check:
            self.engine.cache.check_integrity()

    def drain(self) -> None:
        """Takes the results of all steps in flight."""
        while self.engine.num_in_flight:
            self._receive()

    def _receive(self) -> None:
        result = self._results.get(timeout=DEADLINE)
        if isinstance(result, BaseException):
            raise result
        self.engine.on_result(result, self._clock())

    def __enter__(self) -> "LocalFleet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for commands in self._commands:
            commands.put(None)
        if error is not None:
            return  # a rank has failed, and others may wait for its messages
        for thread in self._threads:
            thread.join(DEADLINE)


class RandomDispatcher:
    """Random placements from a seed, for the placement law."""

    def __init__(self, seed: int | None) -> None:
        """`seed`: None places every lane on its home."""
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def assign(self, sequences: list[EngineSequence], view: FleetView) -> list[Placement | None]:
        return [self._place(view) for _ in sequences]

    def why_not(self, sequence: EngineSequence, view: FleetView) -> str:
        raise AssertionError("every sequence is placed")

    def _place(self, view: FleetView) -> Placement:
        workers = view.plan.worker_ranks if self._generator else ()
        return Placement(
            owners=tuple(tuple(self._choose([home, *workers]) for home in homes) for homes in view.plan.home_ranks)
        )

    def _choose(self, ranks: list[int]) -> int:
        return ranks[int(torch.randint(len(ranks), (1,), generator=self._generator))]


def flat_profile(setup: Setup) -> FleetProfile:
    """A profile in which all devices and all links are alike."""
    way = TransferProfile(alpha_us=5.0, beta_us_per_byte=1e-4)
    devices = {
        info.rank: DeviceProfile(
            key=profile_key(info, setup),
            attention=AttentionProfile(us_per_head=0.5, us_per_byte=1e-4, constant_us=5.0),
            read_bytes_per_us=1e4,
            usable_bytes=info.free_memory,
            layer=None if setup.plan.is_worker(info.rank) else _layer(layer_share(setup, info.rank)),
        )
        for info in setup.fleet
    }
    links = tuple(
        LinkProfile(primary=home.rank, worker=worker.rank, request=way, reply=way) for home, worker in setup.plan.links
    )
    return FleetProfile(devices=devices, links=links)


def _layer(share: LayerShare) -> LayerProfile:
    return LayerProfile(
        share=share,
        dense=DenseProfile(fixed_us=10.0, us_per_weight_byte=1e-4, us_per_flop=1e-5),
        prefill=PrefillProfile(fixed_us=5.0, us_per_pair=1e-3) if share.num_groups else None,
    )


def _device(rank: int, device: torch.device) -> DeviceInfo:
    if device.type == "cuda":
        return describe_device(rank, device, "127.0.0.1", "here")
    return DeviceInfo(
        rank=rank,
        device="cpu",
        name="test",
        host="here",
        address="127.0.0.1",
        pid=os.getpid(),
        num_threads=1,
        total_memory=8 * GIB,
        free_memory=8 * GIB,
    )


def _collect(one: Generated, output: TokenOutput) -> None:
    one.token_ids += output.token_ids
    one.rows += output.logprobs or []
    one.prompt_rows += output.prompt_logprobs or []
    one.finish_reason = output.finish_reason or one.finish_reason
    one.error = output.error or one.error
