"""Finds and loads the C++ extension (csrc/), which registers the operations `torch.ops.hetis.*`."""

import re
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
INSTALL = "pip install setuptools ninja && pip install --no-build-isolation --force-reinstall --no-deps ."


@cache
def problem() -> str | None:
    """Loads the extension, once per process. None if its operations can be called, else a sentence that says why not.

    Without it every launcher runs its torch reference on the CPU. An extension built for another version of torch is
    not used: torch's C++ interface changes with its version.
    """
    libraries = sorted(FOLDER.glob("_cpu*.so"))
    if not libraries:
        return _sentence(f"is not built: {_cause()}")
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
        built_for = torch.ops.hetis.built_for_torch()
    except (OSError, AttributeError) as error:
        return _sentence(f"cannot be loaded ({error})")
    here = torch.__version__
    if re.match(rf"{re.escape(built_for)}(?!\d)", here):  # "2.13.0" of "2.13.0+cpu" or "2.13.0a0"
        return None
    return _sentence(f"was built for torch {built_for}, and this is torch {here}")


def load() -> bool:
    """Whether the operations of the extension can be called; loads the extension on first use."""
    return problem() is None


def _cause() -> str:
    """Reason that setup.py recorded when it did not build the library."""
    try:
        return (FOLDER / "_cpu.missing").read_text()
    except FileNotFoundError:
        return "hetis runs from sources that were not installed"


def _sentence(what: str) -> str:
    return (
        f"the C++ extension with the CPU kernels {what}; attention and linear layers on the CPU are many times slower, "
        f"and links within a host sleep instead of spinning. Remedy, in the checkout of hetis: {INSTALL}"
    )
