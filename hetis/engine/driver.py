"""The driver process: carries messages between front ends, the engine and the ranks, and watches over all of them.

Started by rank 0 with `DriverArgs` as one JSON line on standard input; answers with `Joining` on standard output. A
second line there is rank 0's last word: shut down in order, or its launcher ends it; without a word it died. Whatever
happens, the driver outlives the ranks of its host: those that do not end by themselves it kills.
"""

import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.comm import children, supervision
from hetis.comm.control import ControlServer
from hetis.core import messages as m
from hetis.core.config import DriverArgs, Joining
from hetis.core.fleet import DeviceInfo, RankStats
from hetis.core.logs import set_up_logging
from hetis.core.profile import FleetProfile
from hetis.core.sizes import plural
from hetis.engine.engine import Engine
from hetis.engine.policies import SOLVERS, check_solver, make_policies
from hetis.engine.profile_files import cached_profiles, keep_profiles, load
from hetis.engine.profiling import Profiling, report_of
from hetis.engine.setup import make_setup
from hetis.engine.start_report import start_lines
from hetis.engine.trace import TraceFile
from hetis.engine.watch import FleetFailedError, Watch

POLL_MILLISECONDS = 200
END_SECONDS = 1.5  # for the ranks to end, when all is well
FAIL_SECONDS = 3.0  # when it is not

_log = logging.getLogger("hetis")


class Driver:
    """One job, from the first `Hello` to `Shutdown`."""

    def __init__(self, args: DriverArgs, server: ControlServer) -> None:
        self._args, self._server = args, server
        self._ranks = [member.rank for member in args.plan.members()]
        self._watch = Watch(args.plan, args.config.step_timeout)
        self._fronts: set[bytes] = set()
        self._waiting_for_stats: set[bytes] = set()
        self._stats: dict[int, RankStats] = {}
        self._setup: m.Setup | None = None
        self._ready: m.EngineReady | None = None
        self._profiling: Profiling | None = None
        self._report = m.ProfileReport(profile=None)
        self._engine: Engine | None = None  # once all is measured
        self._trace: TraceFile | None = None
        self._hellos: dict[int, DeviceInfo] = {}
        self._num_ready = 0
        self._ending = False
        self._begin = time.monotonic()

    def run(self) -> None:
        """Serves until shutdown; FleetFailedError when the fleet cannot go on."""
        _log.info("starting %s", plural(len(self._ranks), "rank"))  # they import torch, which takes a while
        self._server.poller.register(sys.stdin.fileno())
        while not self._ending:
            events = self._wait(POLL_MILLISECONDS)
            if sys.stdin.fileno() in events:
                self._on_end_of_input()
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
            while len(self._stats) < len(self._ranks) and time.monotonic() < deadline:
                self._wait(50)
                self._read_ranks()
        trace.close()

    def _wait(self, milliseconds: int) -> set[object]:
        """For something to read; keeps the books of life and death. Descriptors and sockets that are ready."""
        events = set(dict(self._server.poller.poll(milliseconds)))
        self._read_health()
        for fd in events & set(self._watch.pid_fds):
            self._server.poller.unregister(fd)
            self._watch.on_death(fd)
        return events

    def _on_end_of_input(self) -> None:
        """Rank 0 has a word for us, or died without one."""
        self._server.poller.unregister(sys.stdin.fileno())
        word = sys.stdin.buffer.readline()
        if word == supervision.END:
            self._ending = True
        elif word == supervision.TOLD:
            self._watch.on_parent_death(signal.SIGTERM)
        else:
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
        while (command := self._engine.step()) is not None:
            self._watch.on_step(command.step)
            self._broadcast(command)
        self._deliver()

    def _deliver(self) -> None:
        assert self._engine is not None
        outputs = self._engine.take_outputs()
        if outputs:
            for front in self._fronts:
                self._server.send("front", front, m.Outputs(outputs=outputs))

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
                    self._on_ready()
                case m.StepTimes():
                    assert self._engine is not None
                    self._engine.on_times(message)
                    if self._trace is not None:
                        self._trace.add(message)
                case m.Measured():
                    assert self._profiling is not None
                    self._send_each(self._profiling.on_measured(message))
                    self._begin_if_measured()
                case m.Stats():
                    self._on_stats(message.stats)

    def _on_hello(self, info: DeviceInfo) -> None:
        self._hellos[info.rank] = info
        fd = self._watch.on_hello(info)
        if fd is not None:
            self._server.poller.register(fd)
        if len(self._hellos) < len(self._ranks):
            return
        check_solver(self._args.config.dispatch)
        setup, ledger = make_setup(self._args, [self._hellos[rank] for rank in self._ranks])
        self._watch.plan = setup.plan
        if (path := self._args.config.profile) is not None:  # before the ranks load: it may not fit
            self._report = report_of(load(Path(path), FleetProfile), setup, path)
        self._setup = setup
        if (trace := self._args.config.trace) is not None:
            self._trace = TraceFile(Path(trace), setup.plan, setup.fleet, time.time())
        self._ready = m.EngineReady(
            max_model_len=setup.max_model_len,
            vocab_size=setup.spec.vocab_size,
            ledger=ledger,
            eos_token_ids=setup.eos_token_ids,
        )
        for line in start_lines(self._args.config, setup):
            _log.info("%s", line)
        _log.debug("memory:\n%s", ledger)
        self._broadcast(setup)

    def _on_ready(self) -> None:
        self._num_ready += 1
        if self._num_ready < len(self._ranks):
            return
        assert self._setup is not None
        config, plan = self._args.config, self._setup.plan
        is_needed = bool(plan.workers) and config.dispatch in SOLVERS
        if config.profile is None and (is_needed or config.measure):
            known = cached_profiles(self._setup) if config.profile_cache and not config.measure else {}
            self._profiling = Profiling(self._setup, known, share=config.profile_cache)
            self._send_each(self._profiling.start())
            _log.info("measuring devices and links: %d measurements", self._profiling.num_jobs)
        self._begin_if_measured()

    def _begin_if_measured(self) -> None:
        """The fleet is up, unless somebody still measures."""
        assert self._setup is not None
        if self._profiling is not None:
            for front in self._fronts:
                done, total = self._profiling.num_done, self._profiling.num_jobs
                self._server.send("front", front, m.Measuring(done=done, total=total))
            if not self._profiling.is_finished:
                return
            self._report = self._profiling.report()
            if self._args.config.profile_cache:
                keep_profiles(self._profiling.new())
        policies = make_policies(self._args.config, self._setup, self._report.profile)
        self._engine = Engine(self._setup, policies, self._args.config.migration_budget)
        _log.info("the fleet is up after %.1f s", time.monotonic() - self._begin)
        for front in self._fronts:
            self._greet(front)
        if self._waiting_for_stats:
            self._ask_for_stats()

    def _greet(self, front: bytes) -> None:
        assert self._ready is not None
        self._server.hide()
        self._server.send("front", front, self._ready)

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
        for rank in self._hellos:
            self._server.send("ranks", str(rank).encode(), payload)

    # --- front ends ---------------------------------------------------------------------------------------------------

    def _read_fronts(self) -> None:
        while (received := self._server.receive("front")) is not None:
            front, message = received
            match message:
                case m.Attach():
                    self._fronts.add(front)
                    if self.is_up:
                        self._greet(front)
                case m.AddRequest() | m.AbortRequest():
                    self._on_request(front, message)
                case m.FleetQuery():
                    if self.is_up and not self._waiting_for_stats:
                        self._ask_for_stats()
                    self._waiting_for_stats.add(front)  # until the fleet is up
                case m.ProfileQuery():
                    self._server.send("front", front, self._report)
                case m.Shutdown():
                    self._ending = True

    def _on_request(self, front: bytes, message: m.AddRequest | m.AbortRequest) -> None:
        """A front end that does not wait for `EngineReady` is told so: nothing runs that could take its request."""
        if self._engine is None:
            reason = "the fleet is not up yet: wait for EngineReady."
            refused = m.TokenOutput(id=message.id, token_ids=[], finish_reason="error", error=reason)
            self._server.send("front", front, m.Outputs(outputs=[refused]))
        elif isinstance(message, m.AddRequest):
            self._engine.add(message)
        else:
            self._engine.abort(message.id)

    def _ask_for_stats(self) -> None:
        self._stats = {}
        self._broadcast(m.StatsQuery())

    def _on_stats(self, stats: RankStats) -> None:
        self._stats[stats.rank] = stats
        if len(self._stats) < len(self._ranks):
            return
        assert self._engine is not None
        answer = self._engine.fleet_stats(self._stats)
        for front in self._waiting_for_stats:
            self._server.send("front", front, answer)
        self._waiting_for_stats.clear()

    def fail(self, failure: FleetFailedError) -> None:
        """Says why, once and to everybody; has stopped processes killed by their neighbours; ends when all have."""
        verdict = supervision.Verdict(str(failure), failure.refused)
        if supervision.leave_verdict(self._args.run_directory, verdict) and self._args.announce:
            print(f"hetis: {failure}", file=sys.stderr, flush=True)
        for front in self._fronts:
            self._server.send("front", front, m.EngineDead(reason=str(failure)))
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
    line = sys.stdin.buffer.readline()
    if not line:
        sys.exit(1)  # rank 0 is gone already
    args = msgspec.json.decode(line, type=DriverArgs)
    set_up_logging("driver")
    server = ControlServer(args.run_directory, args.address)
    joining = Joining(endpoints=server.endpoints, devices=[member.device for member in args.plan.members()])
    with suppress(BrokenPipeError):  # its end is noticed in the loop
        os.write(sys.stdout.fileno(), msgspec.json.encode(joining) + b"\n")
    driver = Driver(args, server)
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


def verdict_on(error: Exception, is_up: bool) -> FleetFailedError:
    """What an error in the driver means. Until the fleet is up a ValueError is the user's: a plan that does not fit."""
    if isinstance(error, ValueError) and not is_up:
        return FleetFailedError(str(error), refused=True)
    return FleetFailedError(f"the driver failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
