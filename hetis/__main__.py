"""Entry point of `python -m hetis`, also of every rank under torchrun."""

import os
import sys


def leave_working_directory() -> None:
    """Removes the working directory from `sys.path`, where `python -m` puts it: its files may shadow libraries."""
    try:
        here = os.getcwd()
    except OSError:  # deleted, hence not on the path
        return
    if not sys.flags.safe_path and sys.path[0] == here:
        del sys.path[0]


if __name__ == "__main__":
    leave_working_directory()  # before anything else is imported
    from hetis.cli.main import main

    main()
