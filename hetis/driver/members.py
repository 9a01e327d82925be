"""All processes of a job as the driver sees them: their messages, their signs of life, and their end."""

from collections.abc import Iterator

from hetis.comm.board import Board
from hetis.comm.control import ControlServer, encode
from hetis.core import messages as m
from hetis.core.config import DriverArgs
from hetis.driver.front_ends import FrontEnds
from hetis.driver.watch import FleetFailedError, Watch
from hetis.processes.failure import FailureRecord

POLL_MILLISECONDS = 200
END_SECONDS = 1.5  # that ranks have for their last answers when the job ends


class JobEndedError(Exception):
    """Not a failure: the root wants the job to end in order."""


class Members:
    """Ranks, agents and front ends over one poller. Agents see how ranks end, and end them."""

    def __init__(self, args: DriverArgs, server: ControlServer, owner: int) -> None:
        """`owner`: descriptor that becomes readable when the agent, this process's parent, ends the job or has died."""
        self._args, self._server, self._owner = args, server, owner
        self.ranks = args.plan.ranks
        self.watch = Watch(args.plan, args.config.step_timeout)
        self.front_ends = FrontEnds(server)
        self._joined: list[int] = []
        self._agents: dict[bytes, list[int]] = {}  # agent -> its ranks
        self._board = Board()
        self._is_ending = False
        self._request: str | None = None  # of a launcher, as front ends have got it
        server.poller.register(owner)

    def wait(self, milliseconds: int = POLL_MILLISECONDS) -> None:
        """Waits for messages; notes signs of life and of ends, and answers what concerns no other part."""
        events = dict(self._server.poller.poll(milliseconds))
        self._read_health()
        self._read_agents()
        while (received := self._server.receive("board")) is not None:
            for rank, published in self._board.answer(*received):
                self._server.send("board", rank, published)
        if self._owner in events:
            self._server.poller.unregister(self._owner)
            self._is_ending = True
        self.front_ends.notice_ends(set(events))

    def check(self) -> None:
        """Raises JobEndedError when the job is to end in order, and FleetFailedError when the fleet cannot go on."""
        if self._is_ending:
            raise JobEndedError
        self.watch.check()
        if self._request != (request := self.watch.end_request) and request is not None:
            self._request = request
            self.front_ends.tell(m.EndRequested(reason=request))

    def _read_health(self) -> None:
        while (received := self._server.receive("health")) is not None:
            _, message = received
            if isinstance(message, m.Heartbeat):
                self.watch.on_heartbeat(message.rank, message.step)
            else:
                self.watch.on_failure(message)

    def _read_agents(self) -> None:
        while (received := self._server.receive("agents")) is not None:
            agent, message = received
            match message:
                case m.AgentHello():
                    self._agents[agent] = message.ranks
                case m.Ping():
                    self._server.send("agents", agent, m.Pong())
                case m.RankEnded():
                    self.watch.on_end(message.rank, message.status)
                case m.AskedToEnd():
                    self.watch.on_request(self._agents.get(agent, []))

    # --- ranks --------------------------------------------------------------------------------------------------------

    def from_ranks(self) -> Iterator[m.Message]:
        """Messages of ranks, as long as there are any."""
        while (received := self._server.receive("ranks")) is not None:
            _, message = received
            if isinstance(message, m.Hello):
                self._joined.append(message.info.rank)
                self.watch.on_hello(message.info)
            yield message

    def send(self, rank: int, message: m.Message) -> None:
        self._server.send("ranks", str(rank).encode(), message)

    def broadcast(self, message: m.Message) -> None:
        """Sends to all ranks that have joined."""
        payload = encode(message)
        for rank in self._joined:
            self._server.send("ranks", str(rank).encode(), payload)

    # --- front ends ---------------------------------------------------------------------------------------------------

    def from_front_ends(self) -> Iterator[tuple[bytes, m.Message]]:
        """(front end, message), as long as there are any."""
        yield from self.front_ends.receive()

    # --- the end ------------------------------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Ends the job in order. Agents kill ranks that do not end soon."""
        self.broadcast(m.Shutdown())
        self._end(None)

    def fail(self, error: FleetFailedError) -> None:
        """Records the failure reason, and gives it to front ends and to agents, which kill their ranks."""
        FailureRecord(self._args.run_directory).write(error.reason)
        self.front_ends.tell(m.EngineDead(reason=error.reason.text))
        self._end(error.reason.text)

    def _end(self, reason: str | None) -> None:
        self._read_agents()  # one may have come last
        for agent in self._agents:
            self._server.send("agents", agent, m.End(reason=reason))
