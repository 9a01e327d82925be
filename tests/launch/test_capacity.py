"""Too many ranks for this host are refused with the numbers, before one starts."""

import psutil
import pytest

from hetis import LLM
from hetis.core.plan import AttentionWorker, Plan
from hetis.core.plan_sources import split_evenly
from hetis.launch.capacity import ALWAYS, RANK_BYTES, RANKS_PER_CORE, why_too_many
from hetis.processes.limits import Memory
from tests.core.test_plan import SPEC

GIB = 1 << 30
PLENTY = Memory(1024 * GIB, 1024 * GIB)


def plan(num_workers: int, device: str = "cpu") -> Plan:
    return split_evenly(f"1+{num_workers}", SPEC, device)


def test_memory_is_a_limit_whatever_the_cores() -> None:
    memory = Memory(24 * GIB, 22 * GIB)
    reason = why_too_many(plan(400), memory, 1000.0)
    assert reason is not None
    assert all(words in reason for words in ("401 ranks", "160.00 MiB", "62.66 GiB", "22.00 GiB"))
    most = memory.available // RANK_BYTES
    assert why_too_many(plan(most - 1), memory, 1000.0) is None
    assert why_too_many(plan(most), memory, 1000.0) is not None
    assert why_too_many(plan(most, "cuda"), memory, 1000.0) is not None, "a rank on a GPU is a process as well"


@pytest.mark.parametrize("cores", [0.6, 1.0, 2.0, 2.5, 64.0])
def test_cores_are_a_limit_for_ranks_on_the_cpu(cores: float) -> None:
    most = max(ALWAYS, int(RANKS_PER_CORE * cores))
    assert why_too_many(plan(most - 1), PLENTY, cores) is None
    reason = why_too_many(plan(most), PLENTY, cores)
    assert reason is not None
    assert all(words in reason for words in (f"{most + 1} ranks", f"{cores:g} cores", f"{most} at most"))
    assert why_too_many(plan(most, "cuda"), PLENTY, cores) is None
    mixed = plan(most, "cuda")
    workers = tuple(AttentionWorker(rank=worker.rank, device="cpu") for worker in mixed.workers)
    assert why_too_many(Plan(stages=mixed.stages, workers=workers), PLENTY, cores) is None


def test_too_many_ranks_are_refused_before_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(ValueError, match=r"10000 ranks.*oversubscribe"):
        LLM(plan="1+9999", device="cpu")
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before


def test_oversubscribe_starts_them_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetis.launch.capacity.usable_cores", lambda: 0.1)
    monkeypatch.setattr("hetis.launch.capacity.ALWAYS", 0)
    options = {"device": "cpu", "kv_cache_memory": "8MiB", "dispatch": "even"}
    with pytest.raises(ValueError, match="oversubscribe"):
        LLM(**options)
    with LLM(oversubscribe=True, **options) as llm:
        assert llm.generate([[5, 6]])[0].finished
