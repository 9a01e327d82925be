"""hetis: LLM serving over fleets of unlike devices, split by attention head."""

TYPE_CHECKING = False  # as typing has it; nothing is imported before `__main__` has set the path
if TYPE_CHECKING:
    from hetis.core.config import EngineConfig
    from hetis.core.messages import FleetStats
    from hetis.core.outputs import CompletionOutput, RequestOutput
    from hetis.core.sampling_params import SamplingParams
    from hetis.frontend.async_llm import AsyncLLM
    from hetis.frontend.errors import EngineDeadError
    from hetis.frontend.llm import LLM
    from hetis.frontend.requests import Piece

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineDeadError",
    "FleetStats",
    "Piece",
    "RequestOutput",
    "SamplingParams",
]
__version__ = "0.1.0"

_MODULES = {
    "LLM": "hetis.frontend.llm",
    "AsyncLLM": "hetis.frontend.async_llm",
    "SamplingParams": "hetis.core.sampling_params",
    "RequestOutput": "hetis.core.outputs",
    "CompletionOutput": "hetis.core.outputs",
    "Piece": "hetis.frontend.requests",
    "FleetStats": "hetis.core.messages",
    "EngineConfig": "hetis.core.config",
    "EngineDeadError": "hetis.frontend.errors",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: the driver and the ranks load only what they need."""
    if name not in _MODULES:
        raise AttributeError(f"module 'hetis' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
