"""GPUs: whether a device can be used, how a rank describes it, and settings of a process."""

import os
import re

import torch

MIN_CAPABILITY = (8, 0)  # older cards have no bfloat16, and Triton no tensor cores for them


def why_unusable(device: torch.device) -> str | None:
    """Reason why hetis cannot run on a CUDA device of this host, as a clause; None if it can."""
    try:
        name, found = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: an index beyond the last device
        return f"{device} cannot be used ({str(error).partition(chr(10))[0]})"
    if found < MIN_CAPABILITY:
        return f"{device} ({name}) has compute capability {_dotted(found)}, and hetis needs {_dotted(MIN_CAPABILITY)}"
    if not is_built_for(found, torch.cuda.get_arch_list()):
        built = " ".join(torch.cuda.get_arch_list())
        return f"{device} ({name}) has compute capability {_dotted(found)}, and torch was built for {built} only"
    return None


def is_built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for `architectures` ("sm_80", "sm_90a", "compute_90") runs on a GPU of this compute capability.

    Machine code (sm) runs on its own and later minor versions, feature-specific code ("a", "f") on its own version
    only; PTX (compute) is compiled for its own and all later versions.
    """
    for kind, major, minor, specific in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", " ".join(architectures)):
        built = (int(major), int(minor))
        if built == capability or (
            not specific and built <= capability and (kind == "compute" or built[0] == capability[0])
        ):
            return True
    return False


def uuid_of(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def nccl_version() -> str:
    """Version of NCCL, such as "2.28.9"; "" for a torch without NCCL."""
    if not hasattr(torch._C, "_nccl_version"):
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def sum_in_float32() -> None:
    """Forbids matrix products to round partial sums to half precision, which depends on how cuBLAS splits them."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def use_interface_of(address: str) -> None:
    """Makes NCCL use the interface that has `address`, unless the user has set NCCL_SOCKET_IFNAME.

    By default NCCL may choose an interface (of a container bridge, say) that other hosts cannot reach.
    """
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
