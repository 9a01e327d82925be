"""The dispatcher of hetis: places new sequences by measured speeds."""

from hetis.core.placement import FleetView, Placement
from hetis.core.request import Sequence
from hetis.cost.cost_model import CostModel
from hetis.dispatcher.admission import Admission
from hetis.dispatcher.load import is_worth
from hetis.dispatcher.room import shortage_of
from hetis.dispatcher.solver import Solver, choose_solver

FORCED = 0.5  # memory dictates a placement whose step is longer by this fraction than with memory ignored


class HetisDispatcher:
    """Places new sequences so that the makespan of the devices is small (equation (7) of the paper).

    A function of its arguments and of the cost model, which follows what the ranks measure. Four rules are added, each
    because without it a device that joins can make serving slower (docs/dispatch.md):
    - Prompts are computed at home, so lanes leave a home some pages for the next prompts if that costs little. A fast
      home would otherwise fill up with lanes, and the fleet would wait for it.
    - The KV of a prompt must be sent to a worker once; its time is spread over many steps.
    - Workers so slow that all like them could make attention only a little faster get lanes only if memory needs them.
    - Where memory alone forces lanes onto slow devices, sequences wait if taking them lowers sequences per second.
    """

    def __init__(self, cost: CostModel, solver: Solver | None = None) -> None:
        """`solver`: None for that of this process."""
        self._cost, self._solver = cost, solver or choose_solver()

    def assign(self, sequences: list[Sequence], view: FleetView) -> list[Placement | None]:
        """See `core.placement.Dispatcher`. None from the first sequence on that does not fit or had better wait."""
        admission = Admission(self._cost, self._solver, sequences, view)
        placements = admission.placements(admission.decide(_num_worthwhile(admission)))
        return [*placements, *[None] * (len(sequences) - len(placements))]

    def why_not(self, sequence: Sequence, view: FleetView) -> str:
        """Which pages a sequence waits for, or how long a step would be with it; "" if it need not wait."""
        shortage = shortage_of(sequence, view)
        if shortage is not None:
            return str(shortage)
        admission = Admission(self._cost, self._solver, [sequence], view)
        if _num_worthwhile(admission):
            return ""
        now, then = admission.decide(0).cycle_us, admission.decide(1).cycle_us
        return (
            f"there is room only on devices so slow that a step would take {then:.0f} us instead of {now:.0f} us, for "
            f"{admission.num_running + 1} sequences instead of {admission.num_running}"
        )


def _num_worthwhile(admission: Admission) -> int:
    """How many of the sequences that fit to admit now: less those that memory forces where they slow all others."""
    running, count = admission.num_running, admission.num_fitting
    while count:
        cycle_us = admission.decide(count).cycle_us
        fewer = 0 if running else count - max(1, count // 4)
        if is_worth(count - fewer, running + fewer, cycle_us, admission.decide(fewer).cycle_us):
            break
        if cycle_us <= (1 + FORCED) * admission.pooled_cycle_us(count):
            break
        count -= max(1, count // 4)
    return count
