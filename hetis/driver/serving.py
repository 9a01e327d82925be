"""The fleet is up: requests of front ends to the engine, its steps to all ranks, tokens back to each front end."""

import time
from collections.abc import Iterable

from hetis.core import messages as m
from hetis.core.device_info import RankStats
from hetis.driver.front_ends import SequenceIds, StatsCollector
from hetis.driver.members import END_SECONDS, JobEndedError, Members
from hetis.driver.observation import Observation
from hetis.driver.trace import TraceFile
from hetis.engine.engine import Engine


class Serving:
    """One job from the moment when its fleet is up."""

    def __init__(
        self,
        members: Members,
        engine: Engine,
        ready: m.EngineReady,
        report: m.ProfileReport,
        trace: TraceFile | None,
        postponed: list[tuple[bytes, m.Message]],
    ) -> None:
        """`ready`, `report`: answers to `Attach` and `ProfileQuery`. `postponed`: (front end, question) from before."""
        self._members, self._engine, self._trace = members, engine, trace
        self._fronts = members.front_ends
        self._ready, self._report, self._postponed = ready, report, postponed
        self._ids = SequenceIds()
        self._stats = StatsCollector(len(members.ranks))
        self._observation = Observation(engine, members.watch)

    def run(self) -> None:
        """Serves until the job ends in order. FleetFailedError when the fleet cannot go on."""
        self._greet(self._fronts.attached)
        for front, question in self._postponed:
            self._on_front(front, question)
        try:
            while True:
                self._turn()
        except JobEndedError:
            if self._trace is not None:
                self._finish_trace(self._trace)

    def _turn(self) -> None:
        self._members.check()
        self._members.wait()
        self._read_ranks()
        self._drop_gone()
        for front, message in self._members.from_front_ends():
            self._on_front(front, message)
        self._step()

    def _step(self) -> None:
        """Sends all steps that can start, and the tokens that have come."""
        while (command := self._engine.step(time.monotonic())) is not None:
            self._members.watch.on_step(command.step)
            self._members.broadcast(command)
        found = self._ids.by_front(self._engine.take_outputs())
        status = self._observation.status_if_due(time.monotonic()) if found else None
        for front, outputs in found.items():
            self._fronts.answer(front, m.Outputs(outputs=outputs, status=status))

    def _read_ranks(self) -> None:
        for message in self._members.from_ranks():
            match message:
                case m.StepResult():
                    self._members.watch.on_result(message.step)
                    self._engine.on_result(message, time.monotonic())
                case m.StepTimes():
                    self._engine.on_times(message)
                    if self._trace is not None:
                        self._trace.add(message)
                case m.Stats():
                    self._on_stats(message.stats)

    def _on_front(self, front: bytes, message: m.Message) -> None:
        match message:
            case m.Attach():
                self._greet([front])
            case m.Detach():
                self._drop_gone()
            case m.AddRequest():
                self._add(front, message)
            case m.AbortRequest():
                self._abort(front, message.id)
            case m.FleetQuery():
                if self._stats.ask(front):
                    self._ask_for_stats()
            case m.ProfileQuery():
                self._fronts.answer(front, self._report)
            case m.StatusQuery():
                self._fronts.answer(front, self._observation.status())
            case m.FleetSnapshotQuery():
                self._show(front, message)

    def _add(self, front: bytes, request: m.AddRequest) -> None:
        """Without a process to watch, a front end could leave sequences behind, so it has to be attached."""
        if not self._fronts.is_attached(front):
            reason = "this front end is not attached: send Attach first."
            refused = m.TokenOutput(id=request.id, token_ids=[], finish_reason="error", error=reason)
            self._fronts.answer(front, m.Outputs(outputs=[refused]))
            return
        name = self._ids.add(front, request.id)
        if name is None:  # not an output, which would be one of the sequence that runs
            self._fronts.answer(front, m.Refused(reason=f"id {request.id!r} is in use by an unfinished sequence."))
            return
        request.id = name
        self._engine.add(request, time.monotonic())

    def _abort(self, front: bytes, own_id: str) -> None:
        name = self._ids.find(front, own_id)
        if name is not None:
            self._engine.abort(name)
            return
        ended = m.TokenOutput(id=own_id, token_ids=[], finish_reason="abort")
        self._fronts.answer(front, m.Outputs(outputs=[ended]))

    def _drop_gone(self) -> None:
        """Aborts the sequences of front ends that have gone."""
        for front in self._fronts.take_gone():
            self._stats.forget(front)
            for name in self._ids.forget(front):
                self._engine.abort(name)

    def _greet(self, fronts: Iterable[bytes]) -> None:
        """Tells front ends that the fleet is up."""
        for front in fronts:
            self._fronts.answer(front, self._ready)

    # --- statistics ---------------------------------------------------------------------------------------------------

    def _show(self, front: bytes, query: m.FleetSnapshotQuery) -> None:
        """Answers at once, with the ranks' counters of the last time; has them ready for the next time."""
        now = time.monotonic()
        self._fronts.answer(front, self._observation.snapshot(query, now))
        if not self._stats.num_missing and self._observation.ask_ranks(now):
            self._ask_for_stats()

    def _ask_for_stats(self) -> None:
        self._stats.begin()
        self._members.broadcast(m.StatsQuery())

    def _on_stats(self, stats: RankStats) -> None:
        found = self._stats.on_stats(stats)
        if found is None:
            return
        self._observation.on_stats(found, time.monotonic())
        answer = self._engine.fleet_stats(found)
        for front in self._stats.take_asking():
            self._fronts.answer(front, answer)

    def _finish_trace(self, trace: TraceFile) -> None:
        """Waits for the times of all steps: ranks report them before they answer a question."""
        self._ask_for_stats()
        deadline = time.monotonic() + END_SECONDS
        while self._stats.num_missing and time.monotonic() < deadline:
            self._members.wait(50)
            self._read_ranks()
        trace.close()
