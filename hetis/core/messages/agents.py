"""Messages between the driver and the agents, which start the processes of a fleet and see how they end."""

from hetis.core.messages.base import Message

# --- agent -> driver --------------------------------------------------------------------------------------------------


class AgentHello(Message):
    ranks: list[int]  # its children


class RankEnded(Message):
    rank: int
    status: int  # as `os.wait` gives it


class AskedToEnd(Message):
    """The launcher of this agent wants its processes to end."""


class Ping(Message):
    """Answered with `Pong`."""


# --- driver -> agent --------------------------------------------------------------------------------------------------


class Pong(Message):
    """The driver is alive."""


class End(Message):
    """The fleet ends. `reason`: why it failed; None: it ends in order, and ranks have got `Shutdown`."""

    reason: str | None
