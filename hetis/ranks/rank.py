"""The life of one rank: join the driver, build what `Setup` says, obey until `Shutdown`."""

import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch

from hetis.comm.board import BoardRendezvous
from hetis.comm.control import ControlClient
from hetis.comm.groups import init_groups
from hetis.comm.hosts import Token
from hetis.comm.rendezvous import Rendezvous
from hetis.core import messages as m
from hetis.core.config import Joining
from hetis.core.messages.step_command import decode
from hetis.core.sizes import plural
from hetis.models.decoder import Decoder
from hetis.models.hub import resolve_model
from hetis.models.loader import load_weights
from hetis.ranks.build import TORCH_DTYPES, describe_device, open_links, share_of_cores
from hetis.ranks.gpus import sum_in_float32, why_unusable
from hetis.ranks.heartbeat import Heartbeat
from hetis.ranks.primary import PrimaryRank
from hetis.ranks.warm_up import is_needed, warm_up_commands
from hetis.ranks.worker import AttentionWorker
from hetis_kernels import extension

_log = logging.getLogger(__name__)

JOIN_SECONDS = 300.0  # until all ranks have joined; loading has no limit, a rank that loads is alive


def run_rank(
    rank: int,
    local_rank: int,
    ranks_on_host: int,
    address: str,
    joining: Joining,
    open_store: Callable[[], Any],
    agent: socket.socket,
) -> None:
    """Runs this process as `rank`; returns after `Shutdown`.

    After an error it prints the traceback, sends a `Failure` to the driver, and waits for its end. `address`: where
    other hosts reach this one. `open_store`: see `BoardRendezvous`. `agent`: the channel to it.
    """
    heartbeat = Heartbeat(joining.endpoints.health, rank, agent)
    heartbeat.start()
    control = ControlClient(joining.endpoints.ranks, str(rank), "ranks")
    rendezvous = BoardRendezvous(joining.endpoints.board, rank, open_store)
    device_name = choose_device(joining.devices[rank], local_rank)
    if local_rank == 0 and (problem := extension.problem()) is not None:  # once for a host: it is one installation
        _log.warning("%s", problem)

    def fail(error: BaseException) -> NoReturn:
        _report(heartbeat, rank, device_name, error, is_mistake=False)

    try:
        member = _join(control, rank, device_name, ranks_on_host, address, rendezvous, fail)
    except Exception as error:
        _report(heartbeat, rank, device_name, error, is_mistake=isinstance(error, ValueError))
    try:
        if member is not None:
            heartbeat.last_step = lambda: member.last_step
            obey(control, member)
            member.close()
    except Exception as error:
        fail(error)
    heartbeat.stop()
    rendezvous.close()
    control.close(linger=0)  # the driver may have ended


def _join(
    control: ControlClient,
    rank: int,
    device_name: str,
    ranks_on_host: int,
    address: str,
    rendezvous: Rendezvous,
    on_failure: Callable[[BaseException], Any],
) -> PrimaryRank | AttentionWorker | None:
    """Everything from `Hello` to `Ready`; None if the job ends before it began. ValueError for mistakes of the user."""
    token = Token(rank, rendezvous)
    device = prepare_device(device_name, ranks_on_host)
    host = token.host(JOIN_SECONDS)
    control.send(m.Hello(info=describe_device(rank, device, address, host)))
    setup = control.receive(JOIN_SECONDS)
    if setup is None:
        raise TimeoutError(f"the driver sent no setup within {JOIN_SECONDS:.0f} s")
    if isinstance(setup, m.Shutdown):
        return None
    assert isinstance(setup, m.Setup), f"the driver sent {type(setup).__name__} before Setup"
    token.close()
    begin = time.monotonic()
    member = build_member(setup, rank, device, rendezvous, on_failure)
    _log.log(logging.INFO if rank == 0 else logging.DEBUG, "loaded in %.1f s", time.monotonic() - begin)
    if is_needed(setup):
        warm_up(member, setup)
    control.send(m.Ready(rank=rank))
    return member


def choose_device(wanted: str, local_rank: int) -> str:
    """ "auto": this rank's GPU where there is one that hetis can use, else the CPU; "cuda": this rank's GPU."""
    if wanted not in ("auto", "cuda"):
        return wanted
    own = f"cuda:{local_rank}"
    if wanted == "auto" and local_rank >= torch.cuda.device_count():
        return "cpu"
    if wanted == "auto" and (reason := why_unusable(torch.device(own))):
        _log.warning("%s: this rank runs on the CPU.", reason)
        return "cpu"
    return own


def prepare_device(device_name: str, ranks_on_host: int) -> torch.device:
    """The rank's device, made current; ValueError if it is not there or cannot be used."""
    device = torch.device(device_name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            found = plural(torch.cuda.device_count(), "CUDA device")
            raise ValueError(
                f"device {device_name} does not exist here ({found}): name another one in the plan or by --device."
            )
        if reason := why_unusable(device):
            raise ValueError(f"{reason}: give this rank another device, for example cpu.")
        torch.cuda.set_device(device)
        sum_in_float32()
    else:
        torch.set_num_threads(share_of_cores(ranks_on_host))
    torch.set_grad_enabled(False)
    return device


def build_member(
    setup: m.Setup,
    rank: int,
    device: torch.device,
    rendezvous: Rendezvous,
    on_failure: Callable[[BaseException], Any],
) -> PrimaryRank | AttentionWorker:
    """The executor of this rank: weights and groups for a primary, links for both."""
    if setup.plan.is_worker(rank):
        return AttentionWorker(setup, rank, open_links(setup, rank, device, rendezvous), device, on_failure)
    stage, tp_index = setup.plan.position_of(rank)
    links = open_links(setup, rank, device, rendezvous)  # before loading: the workers wait for them
    groups = init_groups(
        setup.plan,
        setup.fleet,
        rank,
        rendezvous,
        device,
        max_tokens=setup.max_num_batched_tokens,
        hidden_size=setup.spec.hidden_size,
        dtype=TORCH_DTYPES[setup.dtype],
        timeout=timedelta(seconds=setup.step_timeout),
    )
    weights = load_weights(
        setup.spec,
        setup.plan,
        stage,
        tp_index,
        resolve_model(setup.model, setup.revision, weights=setup.load_format != "dummy"),
        TORCH_DTYPES[setup.dtype],
        device,
        load_format=setup.load_format,
        seed=setup.seed,
        enforce_eager=setup.enforce_eager,
        show_progress=rank == 0 and setup.progress,
    )
    decoder = Decoder(
        setup.spec,
        weights,
        groups.tensor_parallel,
        max_tokens=setup.max_num_batched_tokens,
        max_position=setup.max_model_len,
        device=device,
    )
    return PrimaryRank(setup, rank, decoder, links, groups.tensor_parallel, groups.pipeline, device)


def warm_up(member: PrimaryRank | AttentionWorker, setup: m.Setup) -> None:
    """Runs the made-up steps, all ranks of the fleet at the same time, and resets counters and times."""
    for command in warm_up_commands(setup):
        member.run_step(decode(command, member.rank))
    member.forget()


def obey(control: ControlClient, member: PrimaryRank | AttentionWorker) -> None:
    """Commands in order until `Shutdown`."""
    while True:
        command = control.receive()
        if isinstance(command, m.StepCommand):
            result = member.run_step(decode(command, member.rank))
            if result is not None:
                control.send(result)
            for times in member.take_times():
                control.send(times)
        elif isinstance(command, m.Measure | m.MeasureLink):
            control.send(member.measurer.measure(command))
        elif isinstance(command, m.StatsQuery):
            stats = member.stats()
            for times in member.take_times():  # of stages that had not been done when their step was handed out
                control.send(times)
            control.send(m.Stats(stats=stats))
        elif isinstance(command, m.Shutdown):
            return


def _report(heartbeat: Heartbeat, rank: int, device_name: str, error: BaseException, is_mistake: bool) -> NoReturn:
    """Logs, and tells the driver, why this rank fails, and waits for the agent to end it. For any thread.

    A lost connection is the failure of another rank, and for a mistake of the user one sentence is enough: neither
    shows a traceback.
    """
    is_consequence = isinstance(error, ConnectionError)
    text = ""
    if not is_consequence and not is_mistake:
        text = "".join(traceback.format_exception(error))
        _log.error("failed on %s", device_name, exc_info=error)
    reason = str(error) if is_consequence or is_mistake else f"{type(error).__name__}: {error}"
    heartbeat.report(m.Failure(rank=rank, reason=reason, traceback=text, is_consequence=is_consequence))
    while True:
        threading.Event().wait()
