"""The front end that rank 0 starts under torchrun: `python -m hetis.launch.front_end DIRECTORY PARENT ARGUMENTS…`.

The same command line in a process of its own, which attaches to the fleet of that run directory and ends with rank 0.
"""

import sys
from pathlib import Path
from typing import NoReturn

from hetis.cli import main as cli
from hetis.launch import member as launch
from hetis.processes import children


def main() -> NoReturn:
    directory, parent, *argv = sys.argv[1:]
    children.begin(int(parent))
    launch.fleet_directory = Path(directory)
    cli.main(argv)


if __name__ == "__main__":
    main()
