"""Finds and loads the C++ extension (csrc/), which registers the operations `torch.ops.hetis.*`."""

import logging
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


@cache
def load() -> bool:
    """Loads the extension once for this process; True when its operations can be called.

    Without it every launcher runs its torch reference on the CPU, which is much slower, and one warning says so. An
    extension that was built for another torch counts as missing, and the warning carries the reason.
    """
    libraries = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not libraries:
        logger.warning(
            "the C++ extension is not built, so attention and linear layers on the CPU run on plain torch, many times "
            "slower; install g++ and run in the checkout of hetis: %s",
            INSTALL,
        )
        return False
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning(
            "the C++ extension %s cannot be loaded (%s), so the CPU runs on plain torch, many times slower; to build "
            "it for torch %s, run in the checkout of hetis: %s",
            libraries[0],
            error,
            torch.__version__,
            INSTALL,
        )
        return False
    return True


def available() -> bool:
    """Is the extension there and loaded?"""
    return load()
