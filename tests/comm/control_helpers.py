"""The driver's end of the control plane, for tests of clients."""

import time
from typing import Any

from hetis.comm.control import Client, ControlServer
from tests.processes.look import DEADLINE


def take(server: ControlServer, client: Client) -> tuple[bytes, Any]:
    """(identity, message) of the next message from one kind of client, as soon as it comes."""
    deadline = time.monotonic() + DEADLINE
    while (received := server.receive(client)) is None:
        assert time.monotonic() < deadline
        server.poller.poll(50)
    return received
