"""Plans for a model, from `P+A`, from a JSON file, or from a dictionary with the contents of such a file.

A plan file has counts where `Plan` has spans; what it leaves out is split evenly over those that left it out:

    {"stages": [{"layers": 3, "primaries": [{"rank": 0, "device": "cpu", "head_groups": 5, "mlp_columns": 700,
                                             "vocab_rows": 500, "kv_memory": "2GiB"}, ...]}, ...],
     "attention": [{"rank": 2, "device": "cpu", "kv_memory": "1GiB"}]}
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hetis.core.model_spec import ModelSpec
from hetis.core.plan import AttentionWorker, Plan, Primary, Stage
from hetis.core.plan_file import FileMember, FilePrimary, FileStage, PlanFile, explain, read_plan_file
from hetis.core.sizes import parse_bytes
from hetis.core.spans import Span, complete, spans

Devices = str | Sequence[str] | Callable[[int], str]  # one name for all ranks, a name per rank, or rank -> name
KvMemory = int | str | Mapping[int, int | str] | None  # of every rank, by rank, or None: decided from free memory

_SPLIT = re.compile(r"(\d+)\+(\d+)")
_MOST_DIGITS = 4
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def resolve_plan(
    plan: str | dict[str, Any],
    spec: ModelSpec,
    device: Devices = "auto",
    kv_memory: KvMemory = None,
    world_size: int | None = None,
) -> Plan:
    """The plan named by `P+A` or by the path of a plan file, or given as what stands in such a file, for `spec`.

    `device` and `kv_memory` (bytes or "2GiB", for every rank or by rank) apply to ranks for which the file names none.
    Raises ValueError with the numbers when the plan does not fit the model or `world_size`.
    """
    if isinstance(plan, dict):
        resolved = _from_dict(plan, spec, device, kv_memory)
    elif plan.endswith(".json") or os.path.isfile(plan):
        resolved = load_plan(Path(plan), spec, device, kv_memory)
    else:
        resolved = split_evenly(plan, spec, device, kv_memory)
    if world_size is not None and resolved.world_size != world_size:
        raise ValueError(
            f"plan {plan!r} has {resolved.world_size} ranks, but the world size is {world_size}; start "
            f"{resolved.world_size} processes."
        )
    return resolved


def split_evenly(plan: str, spec: ModelSpec, devices: Devices = "auto", kv_memory: KvMemory = None) -> Plan:
    """`P+A`: one stage of P tensor-parallel primaries (ranks 0 .. P-1) and A attention workers, all shares even.

    With more primaries than head groups the last ones have none. Raises ValueError for text that is not P+A, for P = 0
    and for primaries that would have nothing at all.
    """
    match = _SPLIT.fullmatch(plan.strip())
    if match is None:
        raise ValueError(f"plan {plan!r} is neither P+A (as 1+2) nor the path of an existing plan file.")
    if max(len(match[1]), len(match[2])) > _MOST_DIGITS:
        raise ValueError(f"plan {plan!r} has more ranks than any fleet; use at most {10**_MOST_DIGITS - 1} of a kind.")
    num_primaries, num_workers = int(match[1]), int(match[2])
    if num_primaries < 1:
        raise ValueError(f"plan {plan!r} has no primary; at least one rank must hold weights, as in 1+{num_workers}.")
    members = [FileMember()] * num_workers
    file = PlanFile(stages=[FileStage(primaries=[FilePrimary()] * num_primaries)], attention=members)
    try:
        return _build(file, spec, devices, kv_memory)
    except ValueError as error:
        raise ValueError(f"plan {plan!r}: {error}") from error


def load_plan(path: Path | str, spec: ModelSpec, devices: Devices = "auto", kv_memory: KvMemory = None) -> Plan:
    """The plan in a JSON file (format above), completed and checked against the model.

    Raises ValueError, naming the file and the numbers, for a file that cannot be read, unknown or misspelt fields,
    counts that do not add up to the model's, stages without layers, primaries without anything, and ranks that are not
    0 .. world size - 1.
    """
    file = read_plan_file(Path(path))
    try:
        return _build(file, spec, devices, kv_memory)
    except ValueError as error:
        raise ValueError(f"plan file {path}: {error}") from error


def _from_dict(plan: dict[str, Any], spec: ModelSpec, devices: Devices, kv_memory: KvMemory) -> Plan:
    try:
        return _build(msgspec.convert(plan, PlanFile), spec, devices, kv_memory)
    except msgspec.ValidationError as error:
        raise ValueError(f"the plan is not one: {explain(str(error))}.") from error
    except ValueError as error:
        raise ValueError(f"the plan: {error}") from error


def _build(file: PlanFile, spec: ModelSpec, devices: Devices, kv_memory: KvMemory) -> Plan:
    """Raises ValueError, in words that follow the name of the plan, for what does not fit the model."""
    if not file.stages:
        raise ValueError("there is no stage; give at least one stage with one primary.")
    layers = spans(complete([stage.layers for stage in file.stages], spec.num_layers, "layers", "the stages", least=1))
    ranks = iter(_ranks([*(p for stage in file.stages for p in stage.primaries), *file.attention]))

    def place(member: FileMember) -> tuple[int, str, int | None]:
        rank = next(ranks)
        device = _device_name(devices if member.device in (None, "auto") else str(member.device), rank)
        return rank, device, _kv_memory_of(kv_memory if member.kv_memory is None else member.kv_memory, rank)

    stages = []
    for index, (span, stage) in enumerate(zip(layers, file.stages, strict=True)):
        if not stage.primaries:
            raise ValueError(f"stage {index} has no primary; give at least one.")
        primaries = []
        for member, g, c, r in zip(stage.primaries, *_shares(index, stage, spec), strict=True):
            rank, device, memory = place(member)
            primaries.append(Primary(rank=rank, device=device, groups=g, mlp_columns=c, vocab_rows=r, kv_memory=memory))
            _refuse_idle(primaries[-1], index, reads_vocabulary=index in (0, len(file.stages) - 1))
        stages.append(Stage(layers=span, primaries=tuple(primaries)))
    workers = []
    for worker in file.attention:
        rank, device, memory = place(worker)
        workers.append(AttentionWorker(rank=rank, device=device, kv_memory=memory))
    return Plan(stages=tuple(stages), workers=tuple(workers))


def _shares(index: int, stage: FileStage, spec: ModelSpec) -> list[list[Span]]:
    """Spans of head groups, MLP columns and vocabulary rows of a stage's primaries."""
    where = f"the primaries of stage {index}"
    wanted = (
        ([p.head_groups for p in stage.primaries], spec.num_head_groups, "head_groups"),
        ([p.mlp_columns for p in stage.primaries], spec.intermediate_size, "mlp_columns"),
        ([p.vocab_rows for p in stage.primaries], spec.vocab_size, "vocab_rows"),
    )
    return [spans(complete(counts, total, name, where, least=0)) for counts, total, name in wanted]


def _refuse_idle(primary: Primary, stage: int, *, reads_vocabulary: bool) -> None:
    """ValueError for a primary without work. `reads_vocabulary`: the stage has the embedding or the LM head."""
    if primary.num_groups or primary.num_mlp_columns or (primary.num_vocab_rows and reads_vocabulary):
        return
    rows = f"{primary.num_vocab_rows} vocabulary rows"
    rows += "" if reads_vocabulary else ", which only the first and the last stage read"
    raise ValueError(
        f"rank {primary.rank}, a primary of stage {stage}, has nothing to do: 0 head groups, 0 MLP columns and {rows}; "
        f"give it a share, or use fewer primaries."
    )


def _ranks(members: Sequence[FileMember]) -> list[int]:
    """The rank of every member; those without one take the free ranks in order."""
    given = [member.rank for member in members if member.rank is not None]
    if len(set(given)) != len(given) or any(not 0 <= rank < len(members) for rank in given):
        raise ValueError(
            f"the ranks given are {given}; each of the {len(members)} members needs its own, 0 to {len(members) - 1}."
        )
    free = iter(rank for rank in range(len(members)) if rank not in given)
    return [next(free) if member.rank is None else member.rank for member in members]


def _device_name(devices: Devices, rank: int) -> str:
    """Device of `rank`. Raises ValueError for a name that no rank can have."""
    if isinstance(devices, str):
        name = devices
    elif callable(devices):
        name = devices(rank)
    elif rank < len(devices):
        name = devices[rank]
    else:
        raise ValueError(f"{len(devices)} devices are given, but the plan has a rank {rank}; give one device per rank.")
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} of rank {rank} is unknown; use cpu, cuda, cuda:N or auto.")
    return name


def _kv_memory_of(kv_memory: KvMemory, rank: int) -> int | None:
    """Bytes for KV pages on `rank`; None: not given. Raises ValueError for a size that is not understood."""
    size = kv_memory.get(rank) if isinstance(kv_memory, Mapping) else kv_memory
    return None if size is None else parse_bytes(size)
