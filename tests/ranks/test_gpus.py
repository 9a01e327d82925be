"""Choice of GPUs and their settings; results of torch.cuda are replaced."""

import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from hetis.ranks import build
from hetis.ranks.build import describe_device
from hetis.ranks.gpus import is_built_for, nccl_version, use_interface_of
from hetis.ranks.rank import choose_device, prepare_device

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"]


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], built_for: list[str] = WHEEL) -> None:
    """Makes torch report GPUs of these compute capabilities."""
    cuda = {
        "is_available": lambda: bool(capabilities),
        "device_count": lambda: len(capabilities),
        "get_device_name": lambda device: f"GPU {torch.device(device).index or 0}",
        "get_device_capability": lambda device: capabilities[torch.device(device).index or 0],
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"uuid-{torch.device(device).index or 0}"),
        "get_arch_list": lambda: built_for,
        "mem_get_info": lambda device: (3, 4),
        "set_device": lambda device: None,
    }
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture(autouse=True)
def restore_settings() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before
    torch.set_grad_enabled(True)


def test_a_gpu_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), (9, 0))
    assert prepare_device("cuda:1", 1) == torch.device("cuda:1")
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5)])
def test_an_old_gpu_is_refused_if_named_and_skipped_by_auto(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, capability)
    dotted = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=rf"cuda:0 \(GPU 0\) has compute capability {dotted}.*needs 8\.0.*cpu"):
        prepare_device("cuda:0", 1)
    with caplog.at_level(logging.WARNING):
        assert choose_device("auto", 0) == "cpu"
    [record] = caplog.records
    assert f"compute capability {dotted}" in record.message
    assert record.message.endswith("this rank runs on the CPU.")


def test_a_torch_without_code_for_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), built_for=["sm_90", "sm_100"])
    with pytest.raises(ValueError, match=r"compute capability 8\.0, and torch was built for sm_90 sm_100 only"):
        prepare_device("cuda:0", 1)
    assert choose_device("auto", 0) == "cpu"


def test_a_gpu_with_a_broken_driver_is_refused_if_named_and_skipped_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: object) -> str:
        raise RuntimeError("The NVIDIA driver on your system is too old\nand so on")

    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert choose_device("auto", 0) == "cpu"
    with pytest.raises(ValueError, match=r"cuda:0 cannot be used \(The NVIDIA driver on your system is too old\)"):
        prepare_device("cuda:0", 1)


def test_named_devices_are_used_or_refused_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert [choose_device("auto", local_rank) for local_rank in range(2)] == ["cuda:0", "cpu"]
    assert [choose_device(wanted, 1) for wanted in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    with pytest.raises(ValueError, match=r"device cuda:1 does not exist here \(1 CUDA device\)"):
        prepare_device("cuda:1", 1)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_80"], True),  # a later minor version
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),  # another major version
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX is compiled when it is loaded
        ((7, 5), ["compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),  # features of 10.0 only
        ((12, 0), ["sm_90", "sm_120"], True),
        ((12, 1), ["sm_100", "sm_120"], True),
        ((8, 0), [], False),
    ],
)
def test_code_runs_on_gpus_it_is_compatible_with(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert is_built_for(capability, architectures) is runs


def test_a_rank_describes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), (8, 9))
    monkeypatch.setattr(build, "nccl_version", lambda: "2.28.9")
    info = describe_device(3, torch.device("cuda:1"), "10.0.0.1", "host")
    assert (info.device, info.gpu, info.capability, info.nccl) == ("cuda:1", "uuid-1", (8, 9), "2.28.9")
    other_name = describe_device(4, torch.device("cuda:0"), "10.0.0.1", "host")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="uuid-1"))
    same_gpu = describe_device(5, torch.device("cuda:0"), "10.0.0.1", "host")
    assert other_name.place != info.place == same_gpu.place
    cpu = describe_device(0, torch.device("cpu"), "10.0.0.1", "host")
    assert (cpu.gpu, cpu.capability, cpu.nccl, cpu.place) == ("", (0, 0), "", (cpu.host, "cpu"))


def test_nccl_version_of_builds_with_and_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_nccl_version", raising=False)
    assert nccl_version() == ""
    monkeypatch.setattr(torch._C, "_nccl_version", lambda: 2 << 32 | 28 << 16 | 9, raising=False)
    monkeypatch.setattr(torch._C, "_nccl_version_suffix", lambda: b"", raising=False)
    assert nccl_version() == "2.28.9"


def test_nccl_uses_the_interface_of_the_address_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")  # so that monkeypatch restores it
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    use_interface_of("192.0.2.77")  # of no interface
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    use_interface_of("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    use_interface_of("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth7", "the user's choice stays"
