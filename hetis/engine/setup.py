"""One `Setup` for all ranks, from the configuration and the devices that the ranks report."""

from collections.abc import Sequence

from hetis.core.config import EngineConfig
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import Setup
from hetis.core.model_spec import ModelSpec, resolve_dtype
from hetis.core.plan import Plan
from hetis.cost.links import max_transfer_pages
from hetis.cost.memory import plan_memory


def make_setup(
    config: EngineConfig, spec: ModelSpec, plan: Plan, fleet: Sequence[DeviceInfo], eos_token_ids: list[int]
) -> tuple[Setup, str]:
    """The setup, and the memory ledger as text. `fleet`: in rank order.

    Raises ValueError with the numbers when the plan does not fit the memory.
    """
    plan = plan.with_devices({info.rank: info.device for info in fleet})  # "auto" left the choice to the ranks
    dtype = resolve_dtype(config.dtype, spec)
    ledger = plan_memory(
        spec,
        plan,
        fleet,
        dtype=dtype,
        block_size=config.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
    )
    setup = Setup(
        spec=spec,
        plan=plan,
        fleet=list(fleet),
        model=config.model,
        revision=config.revision,
        load_format=config.load_format,
        dtype=dtype,
        block_size=config.block_size,
        num_pages=ledger.num_pages,
        max_transfer_pages=max_transfer_pages(spec, config.block_size, dtype),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len or ledger.largest_context,
        seed=config.seed,
        enforce_eager=config.enforce_eager,
        eos_token_ids=eos_token_ids,
        logprobs_mode=config.logprobs_mode,
        step_timeout=config.step_timeout,
        trace=config.trace is not None,
        progress=config.progress,
    )
    return setup, str(ledger)
