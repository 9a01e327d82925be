"""The engine: requests in, steps out, tokens back. It has neither a clock nor sockets: time comes in with each call."""

import logging
from collections.abc import Mapping
from math import inf

from hetis.cache.cache_manager import CacheManager
from hetis.cache.migration import Migrator
from hetis.core.batch import Batch, NewToken
from hetis.core.device_info import RankStats
from hetis.core.messages import (
    AddRequest,
    EngineStatus,
    FleetSnapshot,
    FleetSnapshotQuery,
    FleetStats,
    Setup,
    StepCommand,
    StepResult,
    StepTimes,
    TokenOutput,
)
from hetis.core.messages.step_command import encode
from hetis.core.placement import Move
from hetis.core.request import Sequence, check_token_ids
from hetis.core.token_logprobs import TokenLogprobs
from hetis.dispatcher.room import shortage_when_empty
from hetis.engine.balancer import Balancer
from hetis.engine.observer import Observer
from hetis.engine.policies import Policies
from hetis.engine.statistics import member_stats
from hetis.engine.telemetry import Telemetry, link_states, report_waiting
from hetis.scheduler.scheduler import Scheduler

LOG_SECONDS = 10.0  # between two log lines about a sequence that waits

_log = logging.getLogger("hetis")


class Engine:
    """All requests of one fleet, from `add` until their last token, and the steps in flight.

    A function of the calls: the same requests, results and times in the same order give the same steps.
    """

    def __init__(self, setup: Setup, policies: Policies, migration_budget: int = 0, *, depth: int = 0) -> None:
        """`migration_budget`: bytes per second that lanes may move to balance the fleet. `depth`: see `Scheduler`.

        Of `setup` it uses the model, the plan and the sizes; `fleet`, `model` and the like are for ranks.
        """
        spec, plan = setup.spec, setup.plan
        self._setup, self._dispatcher = setup, policies.dispatcher
        self.cache = CacheManager(plan, spec.num_head_groups, setup.num_pages, setup.block_size, setup.max_num_seqs)
        token_bytes = spec.kv_bytes_per_token(1, setup.dtype)
        self.migrator = Migrator(
            self.cache, plan, spec.num_head_groups, setup.block_size, token_bytes, setup.max_transfer_pages
        )
        self._telemetry = Telemetry(setup, self.cache)
        self._balancer, self._observer = None, None
        if policies.rebalancer is not None and policies.cost is not None:
            events = self._telemetry.events
            self._balancer = Balancer(self.cache, self.migrator, policies.rebalancer, migration_budget, events)
            self._observer = Observer(policies.cost, plan)
        self.scheduler = Scheduler(
            self.cache,
            policies.dispatcher,
            self._balancer,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=setup.max_model_len,
            num_stages=len(plan.stages),
            depth=depth,
        )
        self._in_flight: dict[int, Batch] = {}
        self._committed: list[Move] = []  # finished migrations that no command has announced
        self._last_log = -inf
        self._num_steps = 0
        self._num_arrivals = 0
        self._outputs: list[TokenOutput] = []
        self._prompt_logprobs: dict[str, list[TokenLogprobs]] = {}  # by sequence, until its first token

    @property
    def num_in_flight(self) -> int:
        """Steps that have been sent and not come back."""
        return len(self._in_flight)

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: AddRequest, now: float) -> None:
        """Queues a sequence; one that can never run is answered at once with the reason. `now`: as for `step`."""
        try:
            self._queue(request, now)
        except ValueError as error:
            self._outputs.append(TokenOutput(id=request.id, token_ids=[], finish_reason="error", error=str(error)))

    def _queue(self, request: AddRequest, now: float) -> None:
        """Raises ValueError for a sequence that can never run.

        Front ends have checked their requests; the engine checks again, since a mistake would end in the ranks, which
        serve other front ends as well.
        """
        params, prompt_len, num_tokens = request.params, request.prompt_len, len(request.token_ids)
        params.validate_for(self._setup.spec.vocab_size, max_logprobs=-1)
        check_token_ids("the prompt", request.token_ids, self._setup.spec.vocab_size)
        if not 1 <= prompt_len <= num_tokens:
            raise ValueError(f"prompt_len is {prompt_len}, but must be from 1 to {num_tokens}, the number of tokens.")
        if not -(1 << 63) <= request.seed < 1 << 63:
            raise ValueError(f"seed is {request.seed}, but must be a 64-bit integer.")
        shortage = shortage_when_empty(num_tokens + 1, self._setup.plan, self._setup.num_pages, self._setup.block_size)
        if shortage is not None:
            raise ValueError(
                f"a prompt of {num_tokens} tokens can never run on this fleet: {shortage}; "
                "give these ranks more KV memory."
            )
        self.scheduler.add(self._sequence(request, now))

    def _sequence(self, request: AddRequest, now: float) -> Sequence:
        params, arrival = request.params, self._num_arrivals
        self._num_arrivals += 1
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._setup.eos_token_ids))
        return Sequence(
            id=request.id,
            token_ids=list(request.token_ids),
            prompt_len=request.prompt_len,
            params=params,
            max_tokens=params.max_tokens or self._setup.max_model_len,
            seed=request.seed,
            stop_ids=frozenset(stop_ids),
            arrival=arrival,
            queued_at=now,
        )

    def abort(self, sequence_id: str) -> None:
        if self.scheduler.abort(sequence_id) is not None:
            self._prompt_logprobs.pop(sequence_id, None)
            self._outputs.append(TokenOutput(id=sequence_id, token_ids=[], finish_reason="abort"))

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    # --- steps --------------------------------------------------------------------------------------------------------

    def step(self, now: float) -> StepCommand | None:
        """The next step for the whole fleet, or None when nothing can start.

        `now`: seconds on any one clock that never goes back. It decides when the balance is checked and a line logged,
        and dates events and the waiting times that first tokens report.
        """
        self._telemetry.events.now = now
        self._migrate(now)
        self._explain_waiting(now)
        batch = self.scheduler.schedule()
        self._telemetry.on_preempted(self.scheduler.preempted)
        if batch is None:
            return None
        command = self._command(batch)
        self._in_flight[command.step] = batch
        self._num_steps += 1
        self._telemetry.on_step(command.num_tokens, batch.admitted)
        return command

    def _migrate(self, now: float) -> None:
        """Commits finished migrations, and starts others if the fleet is out of balance."""
        finished = self.migrator.commit()
        self._telemetry.on_migrated(finished)
        self._committed += finished
        if self._balancer is not None:
            self._balancer.balance(self.scheduler.running, self.scheduler.refused, now)

    def _explain_waiting(self, now: float) -> None:
        """Logs why the first sequence of the queue is not admitted, at most once in `LOG_SECONDS`."""
        waiting = self.scheduler.refused
        if waiting is None or now - self._last_log < LOG_SECONDS:
            return
        reason = self._dispatcher.why_not(waiting, self.cache.view())
        if reason:  # else there is a place by now
            self._last_log = now
            _log.info("request %s waits: %s.", waiting.request_id, reason)

    def on_times(self, times: StepTimes) -> None:
        """Takes the times that a rank measured in a step."""
        self._telemetry.on_times(times)
        if self._observer is not None:
            self._observer.on_times(times)

    def on_result(self, result: StepResult, now: float) -> None:
        """Appends and streams the tokens of a step, and frees the pages of sequences that ended.

        `now`: as for `step`.
        """
        batch = self._in_flight.pop(result.step)
        self._keep_prompt_logprobs(batch, result)
        for index, new in enumerate(self.scheduler.on_tokens(batch, result.tokens, result.errors.keys())):
            if new is None:  # its sequence had ended, and was answered then
                continue
            logprobs = result.logprobs[index] if result.logprobs else None
            output = self._output(new, logprobs, result.errors.get(index))
            if new.sequence.admitted_at is not None and new.token is not None:
                report_waiting(output, new.sequence, now)
            self._outputs.append(output)

    def _output(self, new: NewToken, logprobs: TokenLogprobs | None, error: str | None) -> TokenOutput:
        sequence = new.sequence
        return TokenOutput(
            id=sequence.id,
            token_ids=[] if new.token is None else [new.token],
            logprobs=None if logprobs is None or new.token is None else [logprobs],
            prompt_logprobs=self._prompt_logprobs.pop(sequence.id, None),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            error=error,
        )

    def _command(self, batch: Batch) -> StepCommand:
        committed, self._committed = self._committed, []
        return encode(
            self._num_steps,
            batch,
            committed=committed,
            pages=self.cache.take_deltas(),
            transfers=self.migrator.plan(self._transfer_bytes(batch)),
        )

    def _transfer_bytes(self, batch: Batch) -> Mapping[int, float]:
        """Most bytes of pages by worker: few beside rows, so that the step takes no longer; no limit without rows."""
        return self._observer.page_bytes if self._observer is not None and batch.rows else {}

    def _keep_prompt_logprobs(self, batch: Batch, result: StepResult) -> None:
        for index, found in result.prompt_logprobs.items():
            row = batch.rows[index]
            if row.sequence.finish_reason is None:
                # a prompt that begins again was preempted: drop what has been kept of it
                before = self._prompt_logprobs.get(row.sequence.id, []) if row.start else []
                self._prompt_logprobs[row.sequence.id] = before + found

    # --- statistics ---------------------------------------------------------------------------------------------------

    def status(self) -> EngineStatus:
        """What the engine knows of its status: neither ages of steps nor silent ranks."""
        usage = self.cache.usage().values()
        return EngineStatus(
            step=self._num_steps - len(self._in_flight),
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_preemptions=self.scheduler.num_preemptions,
            kv_usage=sum(each.pages_used for each in usage) / max(1, sum(each.pages_total for each in usage)),
        )

    def snapshot(self, query: FleetSnapshotQuery, now: float, stats: Mapping[int, RankStats]) -> FleetSnapshot:
        """The fleet as the engine sees it: neither ages of steps nor silent ranks.

        `stats`: what ranks have counted, by rank, as far as it is known.
        """
        return FleetSnapshot(
            status=self.status(),
            clock=now,
            devices=self._telemetry.devices(self._observer),
            links=link_states(self._setup.plan, stats),
            num_stages=len(self._setup.plan.stages),
            num_groups=self._setup.plan.num_groups,
            sequences=self._telemetry.sequences(self.scheduler.running[: query.max_sequences]),
            events=self._telemetry.events.after(query.after_event),
            counters=self._telemetry.counters(self._balancer, self.migrator),
        )

    def fleet_stats(self, stats: Mapping[int, RankStats]) -> FleetStats:
        """The fleet's table. `stats`: what each rank has counted, all ranks."""
        balancer = self._balancer
        return FleetStats(
            members=member_stats(self._setup, self.cache, stats, self._observer),
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_dispatches=self._telemetry.num_dispatches,
            num_rebalances=balancer.num_rebalances if balancer else 0,
            num_reliefs=balancer.num_reliefs if balancer else 0,
            num_migrations=self.migrator.num_committed,
            migrated_bytes=self.migrator.bytes_sent,
        )
