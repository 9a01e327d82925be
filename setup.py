"""Packages `hetis` and `kernels/` (imported as `hetis_kernels`), and the C++ extension from `csrc/`.

The extension is built against the torch that is installed, so install with `--no-build-isolation` when torch is there
(as `make` does). Without torch or a compiler it is left out; hetis then runs on the torch reference and says so once.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REQUIREMENTS = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "numpy",
    "safetensors",
    "transformers>=5",
    "tokenizers",
    "huggingface_hub",
    "pyzmq>=26.4",
    "msgspec",
    "psutil",
    "rich",
]
EXTRAS = {
    "flash": ["flash-attn"],
    "test": ["pytest", "hypothesis", "scipy"],
    "dev": ["ruff", "mypy"],
}


def extension() -> dict[str, Any]:
    """The C++ extension, or nothing when torch is not importable while building.

    Instruction sets are chosen inside the sources, so one set of flags serves all files. OpenMP is not linked: its
    symbols are found in the copy that torch brings along, and both share one pool of threads.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class BuildIfPossible(BuildExtension.with_options(no_python_abi_suffix=True)):  # type: ignore[misc]
        """A missing or failing compiler leaves the extension out instead of ending the installation."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"hetis: C++ extension left out, CPU attention will be slow: {error}", file=sys.stderr)

    module = CppExtension(
        "hetis_kernels._cpu",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.h")),
        # GCC 12 finds uninitialised values inside its own AVX-512 headers
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-maybe-uninitialized"],
    )
    module.optional = True  # an installation may go on without its file
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildIfPossible}}


os.chdir(ROOT)
setup(
    name="hetis",
    version="0.1.0",
    description="LLM serving over fleets of unlike devices, split by attention head",
    python_requires=">=3.11",
    packages=[*find_packages(include=["hetis", "hetis.*"]), "hetis_kernels"],
    package_dir={"hetis_kernels": "kernels"},
    package_data={"hetis": ["py.typed", "assets/**/*"], "hetis_kernels": ["py.typed"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hetis = hetis.server.cli:main"]},
    **extension(),
)
