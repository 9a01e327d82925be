"""The driver process: carries messages between front ends, the engine and the ranks, and watches over all of them.

Started by rank 0 with `DriverArgs` as one JSON line on standard input; answers with `Joining` on standard output. A
second line of input says how the job ends: in order, or because its launcher ends rank 0; input that ends without one
means that rank 0 has died. In every case the driver outlives the ranks of its host, and kills those that do not end by
themselves.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO, RawIOBase
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.core.config import DriverArgs, Joining
from hetis.core.device_info import DeviceInfo, RankStats
from hetis.core.logs import set_up_logging
from hetis.driver.fleet_start import FleetStart
from hetis.driver.front_ends import StatsCollector
from hetis.driver.trace import TraceFile
from hetis.driver.watch import FleetFailedError, Watch, verdict_on
from hetis.engine.engine import Engine
from hetis.processes import children, supervision

POLL_MILLISECONDS = 200
END_SECONDS = 1.5  # for the ranks to end, when all is well
FAIL_SECONDS = 3.0  # when it is not


class Driver:
    """One job, from the first `Hello` to `Shutdown`."""

    def __init__(self, args: DriverArgs, server: ControlServer, parent: RawIOBase) -> None:
        """`parent`: what rank 0 writes; unbuffered, since the poller does not see what has been read ahead."""
        self._args, self._server, self._parent = args, server, parent
        self._ranks = [member.rank for member in args.plan.members()]
        self._watch = Watch(args.plan, args.config.step_timeout)
        self._fronts: set[bytes] = set()
        self._postponed: list[tuple[bytes, m.Message]] = []  # questions of front ends, until the fleet is up
        self._stats = StatsCollector(len(self._ranks))
        self._start = FleetStart(args)
        self._engine: Engine | None = None  # once the fleet is up
        self._trace: TraceFile | None = None
        self._ending = False

    def run(self) -> None:
        """Serves until shutdown; FleetFailedError when the fleet cannot go on."""
        self._server.poller.register(self._parent.fileno())
        while not self._ending:
            events = self._wait(POLL_MILLISECONDS)
            if self._parent.fileno() in events:
                self._on_end_of_rank_0()
            self._read_ranks()
            self._read_fronts()
            self._watch.check()
            self._step()
        if self._trace is not None:
            self._finish_trace(self._trace)
        self._broadcast(m.Shutdown())
        self._outlive([rank for rank in self._ranks if rank != 0], END_SECONDS)

    def _finish_trace(self, trace: TraceFile) -> None:
        """Ranks report all their steps before they answer a question."""
        if self._engine is not None:
            self._ask_for_stats()
            deadline = time.monotonic() + END_SECONDS
            while self._stats.num_missing and time.monotonic() < deadline:
                self._wait(50)
                self._read_ranks()
        trace.close()

    def _wait(self, milliseconds: int) -> set[object]:
        """The descriptors and sockets that have something to read, after heartbeats and ends of ranks are noted."""
        events = set(dict(self._server.poller.poll(milliseconds)))
        self._read_health()
        for fd in events & set(self._watch.pid_fds):
            self._server.poller.unregister(fd)
            self._watch.on_death(fd)
        return events

    def _on_end_of_rank_0(self) -> None:
        """It says how the job ends, or has died."""
        self._server.poller.unregister(self._parent.fileno())
        match self._parent.readline():
            case supervision.END:
                self._ending = True
            case supervision.TOLD:
                self._watch.on_parent_death(signal.SIGTERM)
            case _:
                self._watch.on_parent_death(supervision.await_status(self._args.parent, 1.0))

    def _outlive(self, ranks: list[int], seconds: float) -> None:
        """Waits for the end of these ranks, then sees to it. (Rank 0, our parent, waits for us when all is well.)"""
        deadline = time.monotonic() + seconds
        while (living := set(ranks) & set(self._watch.living())) and time.monotonic() < deadline:
            self._wait(50)
        self._abort("the job ended before this rank had.", {}, living)
        supervision.kill(pid for rank in living if (pid := self._watch.pid_here(rank)) is not None)

    @property
    def is_up(self) -> bool:
        """Whether the fleet serves: all is loaded and measured."""
        return self._engine is not None

    # --- the fleet ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self._engine is None:
            return
        while (command := self._engine.step(time.monotonic())) is not None:
            self._watch.on_step(command.step)
            self._broadcast(command)
        if outputs := self._engine.take_outputs():
            self._send_fronts(m.Outputs(outputs=outputs))

    def _read_ranks(self) -> None:
        while (received := self._server.receive("ranks")) is not None:
            _, message = received
            match message:
                case m.StepResult():
                    assert self._engine is not None
                    self._watch.on_result(message.step)
                    self._engine.on_result(message)
                case m.Hello():
                    self._on_hello(message.info)
                case m.Ready():
                    self._send_each(self._start.on_ready())
                    self._begin_if_started()
                case m.StepTimes():
                    assert self._engine is not None
                    self._engine.on_times(message)
                    if self._trace is not None:
                        self._trace.add(message)
                case m.Measured():
                    self._send_each(self._start.on_measured(message))
                    self._begin_if_started()
                case m.Stats():
                    self._on_stats(message.stats)

    def _on_hello(self, info: DeviceInfo) -> None:
        fd = self._watch.on_hello(info)
        if fd is not None:
            self._server.poller.register(fd)
        setup = self._start.on_hello(info)
        if setup is None:
            return
        self._watch.plan = setup.plan
        if (trace := self._args.config.trace) is not None:
            self._trace = TraceFile(Path(trace), setup.plan, setup.fleet, time.time())
        self._broadcast(setup)

    def _begin_if_started(self) -> None:
        """Front ends learn how far measuring is, or that the fleet is up."""
        if (progress := self._start.progress) is not None:
            self._send_fronts(progress)
        if not self._start.is_finished:
            return
        self._engine = self._start.make_engine()
        self._send_ready(self._fronts)
        postponed, self._postponed = self._postponed, []
        for front, question in postponed:
            self._on_front(front, question)

    def _send_ready(self, fronts: Iterable[bytes]) -> None:
        for front in fronts:
            self._server.hide()
            self._server.send("front", front, self._start.ready)

    def _read_health(self) -> None:
        while (received := self._server.receive("health")) is not None:
            identity, message = received
            if isinstance(message, m.Heartbeat):
                self._watch.on_heartbeat(message.rank, message.step)
                self._server.send("health", identity, m.Pong())
            elif isinstance(message, m.Failure):
                self._watch.on_failure(message)

    def _send_each(self, messages: Iterable[tuple[int, m.Message]]) -> None:
        for rank, message in messages:
            self._server.send("ranks", str(rank).encode(), message)

    def _broadcast(self, message: m.Message) -> None:
        payload = msgspec.msgpack.encode(message)
        for rank in self._start.joined:
            self._server.send("ranks", str(rank).encode(), payload)

    # --- front ends ---------------------------------------------------------------------------------------------------

    def _send_fronts(self, message: m.Message) -> None:
        for front in self._fronts:
            self._server.send("front", front, message)

    def _read_fronts(self) -> None:
        while (received := self._server.receive("front")) is not None:
            self._on_front(*received)

    def _on_front(self, front: bytes, message: m.Message) -> None:
        match message:
            case m.Attach():
                self._fronts.add(front)
                if self.is_up:
                    self._send_ready([front])
            case m.AddRequest() | m.AbortRequest():
                self._on_request(front, message)
            case m.FleetQuery() | m.ProfileQuery() if not self.is_up:
                self._postponed.append((front, message))
            case m.FleetQuery():
                if self._stats.ask(front):
                    self._ask_for_stats()
            case m.ProfileQuery():
                self._server.send("front", front, self._start.report)
            case m.Shutdown():
                self._ending = True

    def _on_request(self, front: bytes, message: m.AddRequest | m.AbortRequest) -> None:
        """Before the fleet is up nothing runs that could take a request: it is answered with an error."""
        if self._engine is None:
            reason = "the fleet is not up yet: wait for EngineReady."
            refused = m.TokenOutput(id=message.id, token_ids=[], finish_reason="error", error=reason)
            self._server.send("front", front, m.Outputs(outputs=[refused]))
        elif isinstance(message, m.AddRequest):
            self._engine.add(message)
        else:
            self._engine.abort(message.id)

    def _ask_for_stats(self) -> None:
        self._stats.begin()
        self._broadcast(m.StatsQuery())

    def _on_stats(self, stats: RankStats) -> None:
        found = self._stats.on_stats(stats)
        if found is None:
            return
        assert self._engine is not None
        answer = self._engine.fleet_stats(found)
        for front in self._stats.take_asking():
            self._server.send("front", front, answer)

    def fail(self, failure: FleetFailedError) -> None:
        """Says why, once, to ranks and front ends; has stopped processes killed by ranks of their hosts; ends when all
        have ended."""
        verdict = supervision.Verdict(str(failure), failure.refused)
        if supervision.leave_verdict(self._args.run_directory, verdict) and self._args.announce:
            print(f"hetis: {failure}", file=sys.stderr, flush=True)
        self._send_fronts(m.EngineDead(reason=str(failure)))
        supervision.kill(failure.culprits.get(supervision.host_id(), []))
        self._abort(str(failure), failure.culprits, self._ranks)
        self._outlive(self._ranks, FAIL_SECONDS)
        if self._args.announce:  # else the front end reads the verdict there
            shutil.rmtree(self._args.run_directory, ignore_errors=True)

    def _abort(self, reason: str, culprits: Mapping[str, list[int]], ranks: Iterable[int]) -> None:
        for host, pids in (culprits or {"": []}).items():
            abort = msgspec.msgpack.encode(m.Abort(reason=reason, host=host, culprits=pids))
            for rank in ranks:
                self._server.send("health", str(rank).encode(), abort)


def main() -> NoReturn:
    children.begin()
    supervision.run_on_without_parent()
    parent = FileIO(sys.stdin.fileno(), closefd=False)
    line = parent.readline()
    if not line:
        sys.exit(1)  # rank 0 is gone already
    args = msgspec.json.decode(line, type=DriverArgs)
    set_up_logging("driver")
    server = ControlServer(args.run_directory, args.address)
    joining = Joining(endpoints=server.endpoints, devices=[member.device for member in args.plan.members()])
    with suppress(BrokenPipeError):  # its end is noticed in the loop
        os.write(sys.stdout.fileno(), msgspec.json.encode(joining) + b"\n")
    driver = Driver(args, server, parent)
    code = 1
    try:
        driver.run()
        code = 0
    except FleetFailedError as failure:
        driver.fail(failure)
    except Exception as error:
        verdict = verdict_on(error, driver.is_up)
        if not verdict.refused:
            traceback.print_exc()
        driver.fail(verdict)
    server.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
