"""Packages `hetis` and `kernels/` (imported as `hetis_kernels`), and the C++ extensions from `csrc/`.

The one for tensors is built against the torch that is installed, so install with `--no-build-isolation` when torch is
there (as `make` does). Without torch or a compiler extensions are left out; hetis then runs on their references in
torch and Python, and says so once.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # then without the torch extension
    BuildExtension = None

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
    "bench": ["matplotlib"],
    "test": ["pytest", "pytest-xdist", "hypothesis", "scipy"],
    "dev": ["ruff", "mypy"],
}


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{folder}/{pattern}"))


def solver() -> Extension:
    """The dispatcher's min-max solver: plain C++ that ctypes loads, without torch and Python.

    It has to return what its Python reference returns, so nothing may be contracted to fused operations.
    """
    return Extension(
        "hetis.dispatcher._solver",
        sources("dispatcher", "*.cpp"),
        depends=sources("dispatcher", "*.h"),
        extra_compile_args=["-std=c++17", "-O2", "-g0", "-ffp-contract=off", "-Wall"],
    )


def kernels() -> Extension:
    """The torch extension.

    Instruction sets are chosen inside the sources, so one set of flags serves all files. OpenMP is not linked: its
    symbols are found in the copy that torch brings along, and both share one pool of threads.
    """
    return CppExtension(
        "hetis_kernels._cpu",
        sources("cpu", "*.cpp"),
        depends=sources("cpu", "*.h"),
        # GCC 12 finds uninitialised values inside its own AVX-512 headers
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-maybe-uninitialized"],
    )


class BuildIfPossible(build_ext if BuildExtension is None else BuildExtension.with_options(no_python_abi_suffix=True)):
    """A missing or failing compiler leaves extensions out instead of ending the installation."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            print(f"hetis: C++ extensions left out, CPU attention will be slow: {error}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"hetis: {ext.name} left out, its work will be done slowly: {error}", file=sys.stderr)


extensions = [solver(), *([] if BuildExtension is None else [kernels()])]
for extension in extensions:
    extension.optional = True  # an installation may go on without its file
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
    ext_modules=extensions,
    cmdclass={"build_ext": BuildIfPossible},
)
