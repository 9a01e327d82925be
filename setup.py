"""Packages `hetis` and `kernels/` (imported as `hetis_kernels`), and the C++ extension from `csrc/`.

The extension is built against the torch that is installed, so install with `--no-build-isolation` when torch is there (as
`make` does). Without torch or a compiler it is left out; hetis then runs on the torch reference and says so once.
"""

import os
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
    "pyzmq",
    "msgspec",
    "psutil",
    "rich",
]
EXTRAS = {
    "flash": ["flash-attn"],
    "test": ["pytest", "hypothesis"],
    "dev": ["ruff", "mypy"],
    "bench": ["matplotlib"],
}


def extension() -> dict[str, Any]:
    """The C++ extension, or nothing when torch is not importable while building."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
    module = CppExtension(
        "hetis_kernels._cpu",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-Wall"],
        extra_link_args=["-fopenmp"],
    )
    module.optional = True
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


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
