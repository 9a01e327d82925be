"""The front end that rank 0 starts under torchrun: `python -m hetis.launch.front_end DIRECTORY PARENT ARGUMENTS…`.

It runs the same command line, attached to the fleet of that run directory, and ends with rank 0.
"""

import sys
from pathlib import Path
from typing import NoReturn

from hetis.cli import main as cli
from hetis.launch import torchrun
from hetis.processes import start


def main() -> NoReturn:
    directory, parent, *argv = sys.argv[1:]
    start.begin(int(parent))
    torchrun.fleet_directory = Path(directory)
    cli.main(argv)


if __name__ == "__main__":
    main()
