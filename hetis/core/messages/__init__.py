"""Everything that crosses a process border, as tagged msgspec structs (msgpack; never pickle).

`ranks`: between driver and ranks. `step_command`: one step for the ranks, with its codec. `frontend`: between front
ends and driver. Which process may receive what is a union in `comm/control.py`.
"""

from hetis.core.messages.base import Message
from hetis.core.messages.frontend import (
    AbortRequest,
    AddRequest,
    Attach,
    Detach,
    DeviceModel,
    EngineDead,
    EngineReady,
    FleetQuery,
    FleetStats,
    Measuring,
    MemberStats,
    Outputs,
    ProfileQuery,
    ProfileReport,
    Refused,
    TokenOutput,
)
from hetis.core.messages.observe import EngineStatus, StatusQuery
from hetis.core.messages.ranks import (
    Abort,
    Failure,
    Heartbeat,
    Hello,
    Measure,
    Measured,
    MeasureLink,
    Pong,
    Ready,
    Setup,
    Shutdown,
    Stats,
    StatsQuery,
    StepResult,
    StepTimes,
)
from hetis.core.messages.step_command import NewSequence, StepCommand

__all__ = [
    "Abort",
    "AbortRequest",
    "AddRequest",
    "Attach",
    "Detach",
    "DeviceModel",
    "EngineDead",
    "EngineReady",
    "EngineStatus",
    "Failure",
    "FleetQuery",
    "FleetStats",
    "Heartbeat",
    "Hello",
    "Measure",
    "MeasureLink",
    "Measured",
    "Measuring",
    "MemberStats",
    "Message",
    "NewSequence",
    "Outputs",
    "Pong",
    "ProfileQuery",
    "ProfileReport",
    "Ready",
    "Refused",
    "Setup",
    "Shutdown",
    "Stats",
    "StatsQuery",
    "StatusQuery",
    "StepCommand",
    "StepResult",
    "StepTimes",
    "TokenOutput",
]
