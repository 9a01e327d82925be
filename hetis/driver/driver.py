"""The driver process: brings the fleet up, serves front ends, and finds the cause when the fleet fails.

    python -m hetis.driver.driver DIRECTORY AGENT

The agent, its parent, starts it; it reads `DriverArgs` from the run directory, and answers with `Joining` as a line on
standard output. When the agent closes its standard input, the job ends in order.
"""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec

from hetis.comm.control import ControlServer
from hetis.core.config import JOB, DriverArgs, Joining
from hetis.core.logs import set_up_logging
from hetis.driver.members import JobEndedError, Members
from hetis.driver.serving import Serving
from hetis.driver.startup import Startup
from hetis.driver.watch import FleetFailedError
from hetis.processes import start

_log = logging.getLogger("hetis")  # this module runs as __main__


def main() -> NoReturn:
    start.begin(int(sys.argv[2]))
    args = msgspec.json.decode((Path(sys.argv[1]) / JOB).read_bytes(), type=DriverArgs)
    set_up_logging("driver")
    server = ControlServer(args.run_directory, args.address)
    joining = Joining(endpoints=server.endpoints, devices=[member.device for member in args.plan.members])
    with suppress(BrokenPipeError):  # `Members` notices the end of the agent
        os.write(sys.stdout.fileno(), msgspec.json.encode(joining) + b"\n")
    code = run_job(args, Members(args, server, sys.stdin.fileno()))
    server.close()
    sys.exit(code)


def run_job(args: DriverArgs, members: Members) -> int:
    """Runs a job to its end; the exit code. Failures are recorded, and agents know the end."""
    try:
        with suppress(JobEndedError):
            start_up(args, members).run()
        members.shut_down()
    except FleetFailedError as error:
        members.fail(error)
        return 1
    except Exception as error:
        _log.exception("failed")
        members.fail(FleetFailedError(f"the driver failed: {type(error).__name__}: {error}"))
        return 1
    return 0


def start_up(args: DriverArgs, members: Members) -> Serving:
    """Until the fleet is up a ValueError is a mistake of the user, such as a plan that does not fit."""
    try:
        return Startup(args, members).run()
    except ValueError as error:
        raise FleetFailedError(str(error), refused=True) from error


if __name__ == "__main__":
    main()
