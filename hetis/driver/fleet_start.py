"""How a fleet comes up: ranks join, load and, where it matters, are measured. A function of messages."""

import logging
import time
from pathlib import Path

from hetis.core import messages as m
from hetis.core.config import DriverArgs
from hetis.core.device_info import DeviceInfo
from hetis.core.profile import FleetProfile
from hetis.driver.profile_files import cached_profiles, keep_profiles, load
from hetis.driver.profiling import Profiling, report_of
from hetis.driver.start_report import start_lines
from hetis.engine.engine import Engine
from hetis.engine.policies import SOLVERS, check_solver, make_policies
from hetis.engine.setup import make_setup

_log = logging.getLogger("hetis")


class FleetStart:
    """One start. Methods give what is to be sent to ranks now; once it is finished the engine can be made."""

    def __init__(self, args: DriverArgs) -> None:
        self._args = args
        self._ranks = [member.rank for member in args.plan.members()]
        self._hellos: dict[int, DeviceInfo] = {}
        self._num_loaded = 0
        self._setup: m.Setup | None = None
        self._ready: m.EngineReady | None = None
        self._profiling: Profiling | None = None
        self._begin = time.monotonic()
        self.report = m.ProfileReport(profile=None)  # final when the start is finished

    @property
    def joined(self) -> list[int]:
        return list(self._hellos)

    @property
    def setup(self) -> m.Setup:
        """Once all ranks have joined."""
        assert self._setup is not None
        return self._setup

    @property
    def ready(self) -> m.EngineReady:
        """What front ends get when the start is finished."""
        assert self._ready is not None
        return self._ready

    @property
    def progress(self) -> m.Measuring | None:
        """How far measuring is; None where nothing is measured."""
        if self._profiling is None:
            return None
        return m.Measuring(done=self._profiling.num_done, total=self._profiling.num_jobs)

    @property
    def is_finished(self) -> bool:
        return self._num_loaded == len(self._ranks) and (self._profiling is None or self._profiling.is_finished)

    def make_engine(self) -> Engine:
        """When the start is finished."""
        assert self.is_finished
        policies = make_policies(self._args.config, self.setup, self.report.profile)
        engine = Engine(self.setup, policies, self._args.config.migration_budget)
        _log.info("the fleet is up after %.1f s", time.monotonic() - self._begin)
        return engine

    def on_hello(self, info: DeviceInfo) -> m.Setup | None:
        """The setup for all ranks, when the last one has joined. ValueError for what does not fit."""
        self._hellos[info.rank] = info
        if len(self._hellos) < len(self._ranks):
            return None
        config = self._args.config
        check_solver(config.dispatch)
        fleet = [self._hellos[rank] for rank in self._ranks]
        setup, ledger = make_setup(config, self._args.spec, self._args.plan, fleet, self._args.eos_token_ids)
        if config.profile is not None:  # before the ranks load: it may not fit
            self.report = report_of(load(Path(config.profile), FleetProfile), setup, config.profile)
        self._setup = setup
        self._ready = m.EngineReady(
            max_model_len=setup.max_model_len,
            vocab_size=setup.spec.vocab_size,
            ledger=ledger,
            eos_token_ids=setup.eos_token_ids,
        )
        for line in start_lines(config, setup):
            _log.info("%s", line)
        _log.debug("memory:\n%s", ledger)
        return setup

    def on_ready(self) -> list[tuple[int, m.Measure | m.MeasureLink]]:
        """A rank has loaded. (rank, message): the first measurements, when it was the last one."""
        self._num_loaded += 1
        if self._num_loaded < len(self._ranks):
            return []
        config = self._args.config
        is_needed = bool(self.setup.plan.workers) and config.dispatch in SOLVERS
        if config.profile is not None or not (is_needed or config.measure):
            return []
        known = cached_profiles(self.setup) if config.profile_cache and not config.measure else {}
        self._profiling = Profiling(self.setup, known, share=config.profile_cache)
        first = self._profiling.start()
        _log.info("measuring devices and links: %d measurements", self._profiling.num_jobs)
        self._keep_if_measured()
        return first

    def on_measured(self, answer: m.Measured) -> list[tuple[int, m.Measure | m.MeasureLink]]:
        """(rank, message): the next measurements."""
        assert self._profiling is not None
        following = self._profiling.on_measured(answer)
        self._keep_if_measured()
        return following

    def _keep_if_measured(self) -> None:
        assert self._profiling is not None
        if self._profiling.is_finished:
            self.report = self._profiling.report()
            if self._args.config.profile_cache:
                keep_profiles(self._profiling.new())
