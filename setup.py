"""Packages `hetis` and `kernels/` (imported as `hetis_kernels`), and the C++ extensions from `csrc/`.

This script creates `build/packages/` with one symbolic link per package, under its import name. An editable
installation puts that folder on Python's path: new modules are found without a new installation, and a checkout in a
folder named `hetis` shadows nothing when Python starts in its parent folder.

The tensor extension is built against the torch of this environment, because torch's C++ interface changes with its
version; a torch downloaded for the build alone would not match. An extension that cannot be built is left out, and a
file `*.missing` in its place holds the cause, which hetis logs at start. With HETIS_REQUIRE_EXTENSIONS=1, which `make`
sets, the installation fails instead.
"""

import os
import shutil
import site
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path += [path for path in site.getsitepackages() if path not in sys.path]  # pip's isolated builds hide torch
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension = None

ROOT = Path(__file__).parent
LINKS = "build/packages"
PACKAGES = {"hetis": "hetis", "hetis_kernels": "kernels"}  # import name -> folder
REQUIRED = os.environ.get("HETIS_REQUIRE_EXTENSIONS") == "1"
KERNELS, SOLVER = "hetis_kernels._cpu", "hetis.dispatcher._solver"
REQUIREMENTS = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "numpy",
    "safetensors",
    "transformers>=5",
    "tokenizers",
    "huggingface_hub",
    "pyzmq>=26.4",
    "msgspec>=0.20",
    "psutil",
    "rich",
    "fastapi>=0.115",
    "uvicorn[standard]>=0.30",
    "pydantic>=2.7",
    "prometheus-client",
    "jinja2>=3.1.6",
    "pyyaml",
]
EXTRAS = {
    "flash": ["flash-attn"],
    "bench": ["matplotlib", "scipy"],
    "otel": ["opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"],
    "test": [
        *("pytest", "pytest-xdist", "hypothesis", "scipy"),
        *("httpx", "openai", "schemathesis", "selenium", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    ],
    "dev": ["ruff", "mypy"],
}


def link_packages() -> None:
    """Creates the missing links in `LINKS`."""
    folder = ROOT / LINKS
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in PACKAGES.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("../..") / target)


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{folder}/{pattern}"))


def solver() -> Extension:
    """The dispatcher's min-max solver: plain C++ that ctypes loads, without torch and Python."""
    return Extension(
        SOLVER,
        sources("dispatcher", "*.cpp"),
        depends=sources("dispatcher", "*.h"),
        extra_compile_args=["-std=c++17", "-O2", "-g0", "-Wall"],
    )


def kernels() -> Extension:
    """The torch extension.

    The sources select instruction sets themselves, so all files share one set of flags. OpenMP is not linked: its
    symbols resolve to the copy that torch ships, so that both share one thread pool.
    """
    return CppExtension(
        KERNELS,
        sources("cpu", "*.cpp"),
        depends=sources("cpu", "*.h"),
        # GCC 12 finds uninitialised values inside its own AVX-512 headers
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-maybe-uninitialized"],
    )


class BuildOrExplain(build_ext if BuildExtension is None else BuildExtension):
    """Leaves out an extension that cannot be built and writes the cause in its place, or fails if REQUIRED."""

    def run(self) -> None:
        self.causes: dict[str, str] = {}
        self.force = True  # torch may have changed since the last build; ninja rebuilds only the affected objects
        if BuildExtension is None:
            self._leave_out(KERNELS, "torch was not installed in this environment when hetis was")
        super().run()
        for name in (KERNELS, SOLVER):
            self._explain(name)

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:  # torch checks the compiler before it builds anything
            for extension in self.extensions:
                self._fail(extension, error)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            self._fail(ext, error)

    def _fail(self, extension: Extension, error: Exception) -> None:
        print(f"hetis: {extension.name}: {error}", file=sys.stderr)
        extension.optional = True  # setuptools then continues without its file
        has_compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++")))
        cause = "the C++ compiler failed" if has_compiler else "there was no C++ compiler (install g++)"
        self._leave_out(extension.name, cause)

    def _leave_out(self, name: str, cause: str) -> None:
        if REQUIRED:
            raise SystemExit(f"hetis: the C++ extension {name} cannot be built: {cause}.")
        print(f"hetis: {name} left out: {cause}", file=sys.stderr)
        self.causes[name] = cause

    def _explain(self, name: str) -> None:
        """Leaves either the library or the cause in the extension's place, nothing of an earlier build."""
        library = Path(self.get_ext_fullpath(name))
        cause = library.with_suffix(".missing")
        if name in self.causes:
            library.unlink(missing_ok=True)
            cause.parent.mkdir(parents=True, exist_ok=True)
            cause.write_text(self.causes[name])
        else:
            cause.unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        """One name for all versions of Python: neither library uses Python's C interface."""
        return os.path.join(*fullname.split(".")) + ".so"


os.chdir(ROOT)
link_packages()
setup(
    name="hetis",
    version="0.1.0",
    description="LLM serving over fleets of unlike devices, split by attention head",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(LINKS),
    package_dir={"": LINKS},
    package_data={"hetis": ["py.typed", "assets/**/*"], "hetis_kernels": ["py.typed"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hetis = hetis.cli.main:main"]},
    ext_modules=[solver(), *([] if BuildExtension is None else [kernels()])],
    cmdclass={"build_ext": BuildOrExplain},
)
