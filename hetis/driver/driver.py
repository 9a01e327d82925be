"""The driver process: brings the fleet up, serves front ends, and watches over all processes of the job.

Rank 0 starts it with `DriverArgs` as one JSON line on standard input; it answers with `Joining` on standard output. A
second line says how the job ends (`driver.final_status`).
"""

import logging
import os
import sys
from contextlib import suppress
from io import FileIO
from typing import NoReturn

import msgspec

from hetis.comm.control import ControlServer
from hetis.core.config import DriverArgs, Joining
from hetis.core.logs import set_up_logging
from hetis.driver.members import JobEndedError, Members
from hetis.driver.serving import Serving
from hetis.driver.startup import Startup
from hetis.driver.watch import FleetFailedError
from hetis.processes import start, supervision

_log = logging.getLogger("hetis")  # this module runs as __main__


def main() -> NoReturn:
    start.begin()
    supervision.run_on_without_parent()
    parent = FileIO(sys.stdin.fileno(), closefd=False)
    line = parent.readline()
    if not line:
        sys.exit(1)  # rank 0 has died
    args = msgspec.json.decode(line, type=DriverArgs)
    set_up_logging("driver")
    server = ControlServer(args.run_directory, args.address)
    joining = Joining(endpoints=server.endpoints, devices=[member.device for member in args.plan.members])
    with suppress(BrokenPipeError):  # `Members` notices the end of rank 0
        os.write(sys.stdout.fileno(), msgspec.json.encode(joining) + b"\n")
    code = run_job(args, Members(args, server, parent))
    server.close()
    sys.exit(code)


def run_job(args: DriverArgs, members: Members) -> int:
    """Runs a job to its end; the exit code. Failures are recorded, and all ranks have ended."""
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
