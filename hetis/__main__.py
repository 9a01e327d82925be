"""`python -m hetis`, and what torchrun starts on every rank."""

import os
import sys


def leave_working_directory() -> None:
    """Off the path, where `python -m` has put it first: a user's file must not take the place of a library."""
    try:
        here = os.getcwd()
    except OSError:  # it has been deleted, and is not on the path
        return
    if not sys.flags.safe_path and sys.path[0] == here:
        del sys.path[0]


if __name__ == "__main__":
    leave_working_directory()  # before anything else is imported
    from hetis.cli.main import main

    main()
