"""`hetis --version`: versions for bug reports, found without importing the packages."""

import platform
from importlib import metadata, util
from pathlib import Path

from hetis import __version__

_EXTENSIONS = (("hetis_kernels", "_cpu*.so", "C++ kernels"), ("hetis.dispatcher", "_solver*.so", "C++ solver"))


def version_text() -> str:
    """One line with the versions of hetis, Python, torch and triton, and the extensions that are built."""
    parts = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in ("torch", "triton"))]
    parts += [
        f"{what} {'built' if _is_built(package, pattern) else 'not built'}" for package, pattern, what in _EXTENSIONS
    ]
    return f"hetis {__version__} ({', '.join(parts)})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _is_built(package: str, pattern: str) -> bool:
    spec = util.find_spec(package)
    places = () if spec is None else spec.submodule_search_locations or ()
    return any(any(Path(place).glob(pattern)) for place in places)
