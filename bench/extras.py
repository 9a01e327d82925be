"""Optional packages that scripts need, and the path to tests/, which can be imported after this module."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def need(*modules: str) -> None:
    """Exits with one sentence if a module is missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(f"{Path(sys.argv[0]).name} needs {', '.join(missing)}: run `make install-bench` first.")
