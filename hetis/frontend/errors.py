"""Errors of a fleet, as its users see them."""


class EngineDeadError(RuntimeError):
    """The fleet has ended; the message says which rank failed, on which device, and why."""

    def again(self) -> "EngineDeadError":
        """A copy, for one more call that waited."""
        return type(self)(str(self))


class FleetRefusedError(EngineDeadError, ValueError):
    """The fleet ended because what was asked for is impossible."""


class ForkedError(RuntimeError):
    """This process was forked after the fleet was started: the connection to it belongs to the parent."""
