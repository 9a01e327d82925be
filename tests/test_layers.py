"""Layers: which package may import which, that nothing uses pickle, and which modules a process must not load.

Imports are read from the syntax tree, also those inside functions. A package may import itself, the standard library
(without clocks, sockets, processes and files where its rule excludes them) and the modules named by its rule.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
IMPURE = ("time", "datetime", "socket", "select", "selectors", "threading", "asyncio", "subprocess", "multiprocessing")
FILES = ("os", "pathlib", "tempfile", "shutil")
PICKLERS = ("pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "marshal", "shelve", "joblib")


class Rule(NamedTuple):
    """Dotted prefixes of modules that a package may import; `never` has precedence over `may`."""

    may: tuple[str, ...]
    never: tuple[str, ...] = ()


POLICIES = ("hetis.dispatcher", "hetis.scheduler", "hetis.cache")
PURE = ("hetis.core", "hetis.cost", *POLICIES, "hetis.engine")
DATA = ("numpy", "msgspec")
RULES = {  # the longest matching prefix applies
    "hetis.core": Rule(("msgspec",), IMPURE),
    "hetis.core.messages.step_command": Rule(("hetis.core", *DATA), IMPURE),  # packs and unpacks arrays
    "hetis.processes": Rule(("hetis.core", "msgspec", "psutil")),
    "hetis.cost": Rule(("hetis.core", *DATA), (*IMPURE, *FILES)),
    "hetis.dispatcher": Rule(("hetis.core", "hetis.cost", *DATA), IMPURE),
    "hetis.cache": Rule(("hetis.core", *DATA), (*IMPURE, *FILES)),
    "hetis.scheduler": Rule(("hetis.core", "hetis.cache", *DATA), (*IMPURE, *FILES)),
    "hetis.engine": Rule(("hetis.core", "hetis.cost", *POLICIES, *DATA), (*IMPURE, *FILES)),
    "hetis.models": Rule(
        ("hetis.core", "hetis_kernels", "torch", "numpy", "safetensors", "huggingface_hub", "rich", "msgspec"),
        ("torch.distributed",),
    ),
    # `hetis_kernels` besides torch: its C++ extension has the waits and signals of shared-memory links.
    "hetis.comm": Rule(("hetis.core", "hetis.processes", "torch", "zmq", "hetis_kernels", *DATA)),
    "hetis.ranks": Rule(
        ("hetis.core", "hetis.processes", "hetis.comm", "hetis.models", "hetis_kernels", "torch", "psutil", *DATA),
        ("torch.distributed",),
    ),
    "hetis.driver": Rule(
        (*PURE, "hetis.processes", "hetis.comm.board", "hetis.comm.control", "hetis.__version__", *DATA)
    ),
    "hetis.launch": Rule(("hetis.core", "hetis.processes", "hetis.models", "hetis.comm.control", "msgspec", "psutil")),
    "hetis.launch.checks": Rule(("hetis.core", "hetis.models", "hetis.driver.profile_files")),
    "hetis.launch.member": Rule(
        ("hetis.core", "hetis.processes", "hetis.launch", "hetis.ranks", "hetis.comm.rendezvous", "torch", "msgspec")
    ),
    "hetis.frontend": Rule(
        (
            *("hetis.core", "hetis.processes", "hetis.models", "hetis.launch", "hetis.comm.control"),
            *("transformers", "tokenizers", "jinja2", "rich", *DATA),
        ),
        ("torch",),
    ),
    # tokenizers and templates only through the front end
    "hetis.server": Rule(
        (
            *(
                "hetis.core",
                "hetis.processes",
                "hetis.frontend",
                "hetis.__version__",
                "fastapi",
                "starlette",
                "pydantic",
            ),
            *("uvicorn", "uvloop", "prometheus_client", "opentelemetry", "msgspec", "yaml"),
        ),
        ("torch", "transformers", "tokenizers"),
    ),
    "hetis.bench_serve": Rule(("hetis.core", "hetis.frontend", "httptools", "matplotlib", *DATA)),
    "hetis.cli": Rule(
        (
            *("hetis.core", "hetis.cost", "hetis.processes", "hetis.launch", "hetis.frontend", "hetis.server"),
            *("hetis.bench_serve", "hetis.__version__", "torch", "transformers", "triton", "rich", "uvloop", "yaml"),
            *DATA,
        ),
    ),
    "hetis_kernels": Rule(("torch", "triton", "numpy", "flash_attn"), ("hetis", "torch.distributed")),
}
EVERYTHING = ("hetis.__main__",)  # may import everything, as may the package `hetis`, which exports public names


class Found(NamedTuple):
    line: int
    name: str  # dotted


def imports(source: str, package: str) -> Iterator[Found]:
    """Imports of `source`, a module of `package`, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Found(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Found(node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            name = str(target.value) if isinstance(target, ast.Constant) else "<computed>"
            yield Found(node.lineno, name)
        elif isinstance(node, ast.Attribute) and dotted(node).startswith(("torch.distributed", "torch.load")):
            yield Found(node.lineno, dotted(node))  # `import torch` is enough to reach these


def dotted(node: ast.expr) -> str:
    """ "a.b.c" for a chain of attributes; "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def part_of(module: str) -> str | None:
    """The key of the rule for `module`; None if it may import everything."""
    parts = [part for part in RULES if within(module, (part,))]
    if not parts:
        assert within(module, EVERYTHING) or module == "hetis", f"no rule applies to {module}; add one to RULES"
    return max(parts, key=len, default=None)


def violations(module: str, source: str, package: str) -> list[str]:
    part = part_of(module)
    if part is None:
        return []
    rule = RULES[part]
    wrong = []
    for line, name in imports(source, package):
        is_own = within(name, (part,)) or name.split(".")[0] in sys.stdlib_module_names
        if within(name, rule.never) or not (is_own or within(name, rule.may)):
            wrong.append(f"{module}, line {line}: {part} must not import {name}")
    return wrong


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of every installed module."""
    files = [("hetis", ROOT / "hetis"), ("hetis_kernels", ROOT / "kernels")]
    return [
        (".".join([name, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"), path)
        for name, folder in files
        for path in sorted(folder.rglob("*.py"))
    ]


def test_every_package_follows_its_rule() -> None:
    wrong = []
    for module, path in modules():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        wrong += violations(module, path.read_text(), package)
    assert not wrong, "\n".join(wrong)


def test_every_rule_applies_to_a_module() -> None:
    assert {part_of(module) for module, _ in modules()} - {None} == RULES.keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hetis.core.plan", "import numpy"),
        ("hetis.core.messages.ranks", "import numpy"),
        ("hetis.cost.fit", "from pathlib import Path"),
        ("hetis.scheduler.scheduler", "def f():\n    import torch"),
        ("hetis.scheduler.scheduler", "from hetis.dispatcher import dispatcher"),
        ("hetis.scheduler.scheduler", "from time import monotonic"),
        ("hetis.cache.cache_manager", "from ..ranks.pool import PagePool"),
        ("hetis.cache.cache_manager", "from ..ranks import pool"),
        ("hetis.ranks.pool", "import torch.distributed as dist"),
        ("hetis.models.decoder", "import torch\ntorch.distributed.all_reduce(x)"),
        ("hetis.models.decoder", "from hetis.comm import groups"),
        ("hetis.ranks.rank", "import zmq"),
        ("hetis.ranks.rank", "import transformers"),
        ("hetis.engine.engine", "import importlib\nimportlib.import_module('torch')"),
        ("hetis.engine.engine", "import importlib\nimportlib.import_module(name)"),
        ("hetis.engine.engine", "from hetis.comm import links"),
        ("hetis.server.app", "import torch"),
        ("hetis.server.app", "from transformers import AutoTokenizer"),
        ("hetis.server.app", "from hetis.driver import driver"),
        ("hetis.server.app", "from hetis.launch.fleet import start_fleet"),
        ("hetis_kernels.rope", "import hetis.core.plan"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert violations(module, source, module.rpartition(".")[0])


# --- no pickle --------------------------------------------------------------------------------------------------------


def unsafe(source: str) -> list[str]:
    """Uses of functions that may run data as code: pickle under all its names, eval and exec."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        what = ""
        if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            what = node.id
        elif isinstance(node, ast.Attribute):
            what = dotted(node) if _is_unsafe_attribute(node) else ""
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            what = node.arg
        if what:
            wrong.append(f"line {node.lineno}: {what}")
    return wrong + [f"line {line}: {name}" for line, name in imports(source, "") if _is_unsafe_import(name)]


def _is_unsafe_attribute(node: ast.Attribute) -> bool:
    name, last = dotted(node), node.attr
    objects = last.endswith(("_object", "_object_list")) or last in ("send_pyobj", "recv_pyobj")
    return objects or name in ("torch.load", "torch.save", "yaml.load", "builtins.eval", "builtins.exec")


def _is_unsafe_import(name: str) -> bool:
    *_, last = name.split(".")
    objects = name.startswith("torch") and last.endswith(("_object", "_object_list"))
    queues = within(name, ("multiprocessing", "torch.multiprocessing")) and last not in (
        "shared_memory",
        "SharedMemory",
        "resource_tracker",
    )
    return objects or queues or within(name, (*PICKLERS, "torch.load", "torch.save", "yaml.load", "builtins.eval"))


def test_there_is_no_pickle() -> None:
    files = [path for folder in ("hetis", "kernels", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    wrong = [f"{path.relative_to(ROOT)}, {found}" for path in files for found in unsafe(path.read_text())]
    assert files
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import dumps",
        "import dill as d",
        "import marshal, json",
        "from shelve import open",
        "__import__('pickle')",
        "eval('1')",
        "run = exec",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "dist.broadcast_object_list(x)",
        "dist.all_gather_object(x, y)",
        "from torch.distributed import scatter_object_list",
        "socket.recv_pyobj()",
        "socket.send_pyobj(x)",
        "import yaml\nyaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "from multiprocessing import Queue",
    ],
)
def test_planted_pickle_is_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "json.load(file)", "from multiprocessing import shared_memory", "re.compile(x)"]
)
def test_harmless_code_is_not_reported(source: str) -> None:
    assert not unsafe(source)


# --- loaded modules ---------------------------------------------------------------------------------------------------


def loaded_by(names: list[str]) -> set[str]:
    """Top-level modules loaded by a new interpreter after importing `names`."""
    code = "import sys\n" + "".join(f"import {name}\n" for name in names) + "print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.split()}


def names_within(*prefixes: str) -> list[str]:
    names = [module for module, _ in modules() if within(module, prefixes)]
    assert names
    return names


def test_the_driver_never_imports_torch() -> None:
    loaded = loaded_by(names_within("hetis.engine", "hetis.driver"))
    assert loaded.isdisjoint({"torch", "triton", "hetis_kernels", "transformers"})


def test_roots_and_agents_never_import_torch() -> None:
    loaded = loaded_by(["hetis.launch.agent", "hetis.launch.fleet", "hetis.launch.torchrun"])
    assert loaded.isdisjoint({"torch", "triton", "hetis_kernels", "transformers"})


def test_the_engine_and_its_policies_load_neither_torch_nor_zmq() -> None:
    policies = names_within(*PURE)
    assert loaded_by(policies).isdisjoint({"torch", "triton", "hetis_kernels", "transformers", "zmq"})


def test_the_server_never_imports_torch() -> None:
    assert loaded_by(names_within("hetis.server")).isdisjoint({"torch", "triton", "hetis_kernels", "transformers"})


def test_ranks_never_import_transformers() -> None:
    loaded = loaded_by(names_within("hetis.ranks", "hetis.models", "hetis.comm"))
    assert loaded.isdisjoint({"transformers", "tokenizers"})
