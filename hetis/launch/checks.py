"""Resolves a configuration for its model, and refuses what can be refused before a process starts."""

from pathlib import Path

from hetis.core.config import EngineConfig
from hetis.core.files import check_writable, refuse_pipe
from hetis.core.model_spec import ModelSpec
from hetis.core.plan import Plan
from hetis.core.plan_sources import resolve_plan
from hetis.core.profile import FleetProfile
from hetis.models.end_tokens import read_eos_token_ids, read_tokenizer_eos
from hetis.models.families import read_model_spec
from hetis.models.hub import expanded, resolve_model
from hetis.models.json_files import read_object
from hetis.models.weight_files import find_tensors


def plan_for(config: EngineConfig) -> tuple[Path, ModelSpec, Plan]:
    """(directory of the model, its architecture, the work of every rank).

    Raises ValueError for settings that do not fit together, and for a profile or trace file that cannot be used.
    """
    _check_named_files(config)
    directory = resolve_model(config.model, config.revision, weights=False)
    if config.tokenizer is not None:
        resolve_model(config.tokenizer, weights=False, what="tokenizer")
    spec = read_model_spec(directory)
    _check_checkpoint(config, directory, spec)
    plan = resolve_plan(config.plan, spec, config.device, config.kv_cache_memory)
    by_rank = config.kv_cache_memory if isinstance(config.kv_cache_memory, dict) else {}
    for rank in by_rank.keys() - range(plan.world_size):
        raise ValueError(f"kv_cache_memory names rank {rank}, but the plan has ranks 0 to {plan.world_size - 1}.")
    return directory, spec, plan


def _check_named_files(config: EngineConfig) -> None:
    """ValueError for a trace file that cannot be written, and for a profile that cannot be read."""
    if config.trace is not None:
        refuse_pipe(Path(config.trace), "trace file")
        check_writable(Path(config.trace), "trace file", (config.plan, config.profile))
    if config.profile is not None:
        from hetis.driver.profile_files import load  # and numpy: 0.1 s of every start

        load(Path(config.profile), FleetProfile)


def _check_checkpoint(config: EngineConfig, directory: Path, spec: ModelSpec) -> None:
    """ValueError for files that ranks would refuse later, as far as they are on this host."""
    if (directory / "generation_config.json").exists():
        read_object(directory / "generation_config.json")
    if config.load_format == "dummy":
        return
    if spec.tied_embeddings:
        resolve_model(config.model, config.revision)  # how much memory they take depends on the weights themselves
    is_local = config.model is None or directory == expanded(config.model)
    if spec.tied_embeddings or is_local:
        find_tensors(directory, spec)


def end_of_sequence_ids(config: EngineConfig, directory: Path, vocab_size: int) -> list[int]:
    """The tokens that end a sequence: those of the model's configuration, and the tokenizer's own, as in vLLM."""
    if config.tokenizer is not None:
        tokenizer_directory = resolve_model(config.tokenizer, weights=False, what="tokenizer")
    else:
        tokenizer_directory = directory
    # ids beyond the vocabulary are never drawn
    own = [token for token in read_tokenizer_eos(tokenizer_directory) if 0 <= token < vocab_size]
    return list(dict.fromkeys([*read_eos_token_ids(directory, vocab_size), *own]))
