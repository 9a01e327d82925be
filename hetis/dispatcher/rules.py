"""Rules of placement beside the proportional one, all behind `core.placement.Dispatcher`.

`HetisDispatcher` solves the min-max problem over predicted times; `EvenDispatcher` and `PrimaryOnlyDispatcher` are
there to be compared with. Each is a function of its arguments, the first one of a cost model too, which follows what is
measured.
"""

from hetis.core.placement import FleetView, Placement
from hetis.core.request import Sequence as Request
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.admission import Admission, Solve
from hetis.dispatcher.balance import balance
from hetis.dispatcher.load import StageDevices, is_worth, stage_devices
from hetis.dispatcher.problem import Problem
from hetis.dispatcher.room import Pages, Room, lacking, pages_of, shortage_of

FORCED = 0.5  # memory dictates a placement if without limits it would be this much faster


class HetisDispatcher:
    """Places new sequences so that the slowest device is as fast as can be (equation (7) of the paper).

    Four rules are added, each because without it a device that joins can make serving slower (docs/dispatch.md):
    - Prompts are computed at home, so lanes leave a home some pages for the next prompts if that costs little. A fast
      home would otherwise fill up with lanes, and the fleet would wait for it.
    - The KV of a prompt must be sent to a worker once; its time is spread over many steps.
    - Workers so slow that all like them could make attention only a little faster get lanes only if memory needs them.
    - Where memory alone forces lanes onto slow devices, sequences wait if taking them lowers sequences per second.
    """

    def __init__(self, cost: CostModel, *, solve: Solve = balance) -> None:
        self._cost, self._solve = cost, solve

    def assign(self, sequences: list[Request], view: FleetView) -> list[Placement | None]:
        """See `core.placement.Dispatcher`. None from the first sequence on that does not fit or had better wait."""
        admission = Admission(self._cost, self._solve, sequences, view)
        placements = admission.placements(admission.decide(_worthwhile(admission)))
        return [*placements, *[None] * (len(sequences) - len(placements))]

    def why_not(self, sequence: Request, view: FleetView) -> str:
        """Why a sequence waits, in words for the log: what is missing where, or what it would cost. "": it need not."""
        shortage = shortage_of(sequence, view)
        if shortage is not None:
            return str(shortage)
        admission = Admission(self._cost, self._solve, [sequence], view)
        if _worthwhile(admission):
            return ""
        now, then = admission.decide(0).cycle_us, admission.decide(1).cycle_us
        return (
            f"there is room only on devices so slow that a step would take {then:.0f} us instead of {now:.0f} us, for "
            f"{admission.num_running + 1} sequences instead of {admission.num_running}"
        )


def _worthwhile(admission: Admission) -> int:
    """How many of the sequences that fit to take now: all but those that memory forces where they slow all others."""
    running, count = admission.num_running, admission.num_fitting
    while count:
        cycle_us = admission.decide(count).cycle_us
        fewer = 0 if running else count - max(1, count // 4)
        if is_worth(count - fewer, running + fewer, cycle_us, admission.decide(fewer).cycle_us):
            break
        if cycle_us <= (1 + FORCED) * admission.ideal_us(count):
            break
        count -= max(1, count // 4)
    return count


class EvenDispatcher:
    """The same number of lanes on every device, whatever it can do: one more than another at most, homes first."""

    def assign(self, sequences: list[Request], view: FleetView) -> list[Placement | None]:
        return _one_by_one(sequences, view, use_workers=True)

    def why_not(self, sequence: Request, view: FleetView) -> str:
        return lacking(sequence, view)


class PrimaryOnlyDispatcher:
    """All lanes at home, as if there were no attention workers."""

    def assign(self, sequences: list[Request], view: FleetView) -> list[Placement | None]:
        return _one_by_one(sequences, view, use_workers=False)

    def why_not(self, sequence: Request, view: FleetView) -> str:
        return lacking(sequence, view)


def _one_by_one(sequences: list[Request], view: FleetView, *, use_workers: bool) -> list[Placement | None]:
    """None is overtaken: after the first sequence that does not fit there are no more placements."""
    stages = stage_devices(view.plan)
    room = Room(stages, view)
    placements: list[Placement | None] = [None] * len(sequences)
    for index, sequence in enumerate(sequences):
        pages = pages_of(sequence, view.page_size)
        if not room.take_prompt(pages):
            break
        counts = [_evenly(stage, free, pages, use_workers) for stage, free in zip(stages, room.free, strict=True)]
        found = [row for row in counts if row is not None]
        if len(found) < len(stages):
            break
        room.take_lanes(found, pages)
        placements[index] = Placement(owners=tuple(stage.owners(row) for stage, row in zip(stages, found, strict=True)))
    return placements


def _evenly(stage: StageDevices, free: list[int], pages: Pages, use_workers: bool) -> list[int] | None:
    """[N] lanes of one sequence: the min-max problem in which a lane costs the same everywhere."""
    num_devices = len(stage.pools)
    problem = Problem(
        num_lanes=stage.num_lanes,
        num_homes=stage.num_homes,
        start_us=[0.0] * num_devices,
        floor_us=[0.0] * num_devices,
        lane_us=[[1.0]] * num_devices,
        most_lanes=[m if use_workers or i < stage.num_homes else 0 for i, m in enumerate(stage.most_lanes)],
        home_pages=[pages.growth],
        worker_pages=[pages.later],
        free_pages=[max(0, left) for left in free],
    )
    counts = balance(problem)
    return None if counts is None else [held[0] for held in counts]
