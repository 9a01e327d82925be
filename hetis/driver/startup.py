"""Start-up of a fleet: ranks join, load and, where placement depends on their speed, are measured."""

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from hetis.core import messages as m
from hetis.core.config import DriverArgs
from hetis.core.device_info import DeviceInfo
from hetis.core.profile import FleetProfile
from hetis.core.sizes import plural
from hetis.cost.cores import crowded_cores
from hetis.driver.members import Members
from hetis.driver.observation import starting_snapshot, starting_status
from hetis.driver.profile_files import cached_profiles, keep_profiles, load
from hetis.driver.profiling import Profiling, report_of
from hetis.driver.serving import Serving
from hetis.driver.start_report import start_lines
from hetis.driver.trace import TraceFile
from hetis.engine.engine import Engine
from hetis.engine.policies import SIMPLE, make_policies
from hetis.engine.setup import make_setup

_log = logging.getLogger("hetis")

Answer = TypeVar("Answer", m.Hello, m.Ready, m.Measured)


class Startup:
    """One start. Front ends that ask meanwhile are answered when the fleet is up; requests are refused."""

    def __init__(self, args: DriverArgs, members: Members) -> None:
        self._args, self._config, self._members = args, args.config, members
        self._postponed: list[tuple[bytes, m.Message]] = []  # (front end, question)

    def run(self) -> Serving:
        """Returns when the fleet is up. Raises ValueError for mistakes of the user, and what `Members.check` raises."""
        begin, config = time.monotonic(), self._config
        fleet = self._join()
        setup, ledger = make_setup(config, self._args.spec, self._args.plan, fleet, self._args.eos_token_ids)
        report = self._known_report(setup)
        trace = None if config.trace is None else TraceFile(Path(config.trace), setup.plan, fleet, time.time())
        self._log_start(setup, ledger)
        self._members.broadcast(setup)
        self._await_loaded()
        if report is None:
            report = self._measure(setup)
        policies, depth = make_policies(config, setup, report.profile), int(config.async_scheduling)
        engine = Engine(setup, policies, config.migration_budget, depth=depth)
        _log.info("the fleet is up after %.1f s", time.monotonic() - begin)
        return Serving(self._members, engine, ready_message(setup, ledger), report, trace, self._postponed)

    def _join(self) -> list[DeviceInfo]:
        """The devices in rank order, when all ranks have said what theirs are."""
        infos: dict[int, DeviceInfo] = {}
        while len(infos) < len(self._members.ranks):
            infos |= {hello.info.rank: hello.info for hello in self._receive(m.Hello)}
        return [infos[rank] for rank in self._members.ranks]

    def _await_loaded(self) -> None:
        num_loaded = 0
        while num_loaded < len(self._members.ranks):
            num_loaded += len(self._receive(m.Ready))

    def _log_start(self, setup: m.Setup, ledger: str) -> None:
        for line in start_lines(self._config, setup):
            _log.info("%s", line)
        for sentence in crowded_cores(setup.plan, setup.fleet):
            _log.warning("%s.", sentence)
        _log.debug("memory:\n%s", ledger)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _known_report(self, setup: m.Setup) -> m.ProfileReport | None:
        """The report if nothing has to be measured. ValueError for a profile that does not fit: before ranks load."""
        config = self._config
        if config.profile is not None:
            return report_of(load(Path(config.profile), FleetProfile), setup, config.profile)
        is_needed = bool(setup.plan.workers) and config.dispatch not in SIMPLE
        return None if is_needed or self._args.measure else m.ProfileReport(profile=None)

    def _measure(self, setup: m.Setup) -> m.ProfileReport:
        """Has ranks measure what the cache does not have, or everything if the user asks for it."""
        use_cache = self._config.profile_cache
        known = cached_profiles(setup) if use_cache and not self._args.measure else {}
        profiling = Profiling(setup, known, share=use_cache)
        _log.info("measuring devices and links: %s", plural(profiling.num_jobs, "measurement"))
        self._continue(profiling, profiling.start())
        while not profiling.is_finished:
            for answer in self._receive(m.Measured):
                self._continue(profiling, profiling.on_measured(answer))
        if use_cache:
            keep_profiles(profiling.new())
        return profiling.report()

    def _continue(self, profiling: Profiling, following: Iterable[tuple[int, m.Measure | m.MeasureLink]]) -> None:
        """Sends the measurements that can start, and tells front ends how many are done."""
        for rank, message in following:
            self._members.send(rank, message)
        self._members.front_ends.tell(m.Measuring(done=profiling.num_done, total=profiling.num_jobs))

    # --- messages -----------------------------------------------------------------------------------------------------

    def _receive(self, kind: type[Answer]) -> list[Answer]:
        """Waits once, and returns what ranks have sent: answers of one kind, for they are asked one thing at a time."""
        self._members.check()
        self._members.wait()
        answers = []
        for message in self._members.from_ranks():
            assert isinstance(message, kind), f"a rank sent {type(message).__name__} instead of {kind.__name__}"
            answers.append(message)
        for front, message in self._members.from_front_ends():
            self._on_front(front, message)
        return answers

    def _on_front(self, front: bytes, message: m.Message) -> None:
        if isinstance(message, m.AddRequest | m.AbortRequest):
            reason = "the fleet is not up yet: wait for EngineReady."
            refused = m.TokenOutput(id=message.id, token_ids=[], finish_reason="error", error=reason)
            self._members.front_ends.answer(front, m.Outputs(outputs=[refused]))
        elif isinstance(message, m.FleetQuery | m.ProfileQuery) and (front, message) not in self._postponed:
            self._postponed.append((front, message))
        elif isinstance(message, m.StatusQuery):
            self._members.front_ends.answer(front, starting_status(self._members.watch))
        elif isinstance(message, m.FleetSnapshotQuery):
            self._members.front_ends.answer(front, starting_snapshot(self._members.watch, time.monotonic()))


def ready_message(setup: m.Setup, ledger: str) -> m.EngineReady:
    return m.EngineReady(
        max_model_len=setup.max_model_len,
        vocab_size=setup.spec.vocab_size,
        ledger=ledger,
        eos_token_ids=setup.eos_token_ids,
    )
