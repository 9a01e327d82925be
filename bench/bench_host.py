"""Host cost of a step on a CPU primary: a model of many tiny layers, whose kernels take next to no time.

    python bench/bench_host.py                     # per layer, 1 and 16 sequences, one and two threads
    python bench/bench_host.py --evict 32          # caches are emptied in every layer, as weights do in a real step

The primary is that of production (`PrimaryRank`), fed by the engine. Time counts by activity of the step, divided by
the layers: DENSE is all between two attentions, APPEND and ATTENTION the calls of the attention. What remains of a step
(planning, embedding, LM head, sampling, bookkeeping) is printed per step. `--evict` reads so many MiB after the
attention of each layer, within the lap of ATTENTION, which then is not printed. Medians and 10 to 90 % of the steps.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from checkpoint import CONFIG

from hetis.comm.rendezvous import LocalRendezvous
from hetis.core.config import EngineConfig
from hetis.core.device_info import DeviceInfo
from hetis.core.messages import AddRequest, StepResult
from hetis.core.messages.step_command import decode
from hetis.core.plan_sources import resolve_plan
from hetis.core.sampling_params import SamplingParams
from hetis.core.step_times import Activity
from hetis.engine.engine import Engine
from hetis.engine.policies import make_policies
from hetis.engine.setup import make_setup
from hetis.models.families import read_model_spec
from hetis.ranks import split_attention
from hetis.ranks.build import describe_device
from hetis.ranks.primary import PrimaryRank
from hetis.ranks.rank import build_member
from hetis_kernels import paged_decode

TINY: dict[str, Any] = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHOWN = (Activity.DENSE, Activity.APPEND, Activity.ATTENTION)


class Primary:
    """An engine and the only primary of its fleet."""

    def __init__(self, directory: Path, num_layers: int) -> None:
        (directory / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": num_layers}))
        config = EngineConfig(
            model=str(directory), plan="1+0", device="cpu", load_format="dummy", max_model_len=2048, seed=0
        )
        spec = read_model_spec(directory)
        plan = resolve_plan(config.plan, spec, config.device, config.kv_cache_memory)
        device: DeviceInfo = describe_device(0, torch.device("cpu"), "127.0.0.1", "here")
        setup, _ = make_setup(config, spec, plan, [device], eos_token_ids=[])
        self.engine = Engine(setup, make_policies(config, setup, None), config.migration_budget)
        member = build_member(setup, 0, torch.device("cpu"), LocalRendezvous(), lambda error: None)
        assert isinstance(member, PrimaryRank)
        self.rank, self._now = member, 0.0

    def add(self, name: str, num_prompt: int, num_output: int) -> None:
        params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True)
        tokens = [(7 * i + len(name)) % 512 for i in range(num_prompt)]
        self.engine.add(AddRequest(id=name, token_ids=tokens, prompt_len=num_prompt, seed=0, params=params), self._now)

    def step(self) -> dict[Activity, float]:
        """Microseconds of one step by activity."""
        command = self.engine.step(self._now)
        assert command is not None, "the requests of the bench are too short"
        result = self.rank.run_step(decode(command, 0))
        assert isinstance(result, StepResult)
        self.engine.on_result(result, self._now)
        self._now += 1.0
        self.engine.take_outputs()
        (times,) = self.rank.take_times()
        return {activity: times.stages[0].activity_us[activity] for activity in Activity}


def evict(num_mib: int) -> None:
    """Lets every decode attention read `num_mib` MiB of other memory."""
    memory = torch.ones(num_mib << 17, dtype=torch.int64)

    def attend_and_evict(*arguments: Any, **options: Any) -> None:
        paged_decode(*arguments, **options)
        torch.ops.hetis.stream_read(memory)

    vars(split_attention)["paged_decode"] = attend_and_evict


def measure(num_layers: int, num_rows: int, num_steps: int) -> dict[Activity, list[float]]:
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        primary = Primary(Path(directory), num_layers)
        for row in range(num_rows):
            primary.add(f"{row:03}", 16, num_steps + 20)
        for number in range(num_steps + 10):
            times = primary.step()
            if number >= 10:
                for activity, us in times.items():
                    found[activity].append(us)
    return found


def spread(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):7.1f} ({tenths[0]:.1f}-{tenths[-1]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="sequences, one token each in a step")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--evict", type=int, default=0, help="MiB read in every layer")
    options = parser.parse_args()
    if options.evict:
        evict(options.evict)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for rows in options.rows:
            found = measure(options.layers, rows, options.steps)
            per_layer = {each: [us / options.layers for us in found[each]] for each in SHOWN}
            shown = SHOWN[:2] if options.evict else SHOWN
            cells = [f"{each.label} {spread(per_layer[each])}" for each in shown]
            sums = spread([sum(step) for step in zip(*(per_layer[each] for each in shown), strict=True)])
            print(
                f"{threads} threads, {rows} rows, us per layer: {' | '.join(cells)} | sum {sums}; "
                f"rest of a step {spread(found[Activity.OTHER])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
