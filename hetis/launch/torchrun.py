"""The environment that torchrun gives to the processes that it starts."""

import os
import socket
from collections.abc import Mapping

from hetis.core.plan import Plan

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_OWN = "TORCHELASTIC_"  # prefix of variables that nothing but torchrun sets

is_root = False  # this process is the root of torchrun's fleet; else a fleet that it starts is its own


def under_torchrun() -> bool:
    """Whether torchrun started this process, as one rank of many.

    RANK and WORLD_SIZE do not tell: cluster software sets them for programs without torchrun, too.
    """
    return bool(os.environ.get("TORCHELASTIC_RUN_ID"))


def check_variables() -> None:
    """Raises ValueError where variables that torchrun sets are missing, or have values that it does not set."""
    missing = [name for name in (*RANK_VARIABLES, *_ADDRESS_VARIABLES) if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"TORCHELASTIC_RUN_ID is set, as by torchrun, but not {', '.join(missing)}: start with torchrun, or unset "
            f"TORCHELASTIC_RUN_ID to start without it."
        )
    for prefix in ("", "LOCAL_", "GROUP_"):
        index, count = f"{prefix}RANK", f"{prefix}WORLD_SIZE"
        if not 0 <= _integer(index) < _integer(count):
            raise ValueError(
                f"{index} is {os.environ[index]} and {count} is {os.environ[count]}: the first must be at least 0 and "
                f"less than the second; start with torchrun, or unset TORCHELASTIC_RUN_ID to start without it."
            )
    if not 0 < _integer("MASTER_PORT") < 1 << 16:
        raise ValueError(f"MASTER_PORT is {os.environ['MASTER_PORT']}: it must be a port, from 1 to 65535.")


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} is {os.environ[name]!r}: it must be a whole number, as torchrun sets it.") from None


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for processes that are no ranks of this torchrun."""
    ours = {*RANK_VARIABLES, *_ADDRESS_VARIABLES}
    return {name: value for name, value in environment.items() if name not in ours and not name.startswith(_OWN)}


def has_many_hosts() -> bool:
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def own_address() -> str:
    """The address at which other hosts reach this one: on the route to torchrun's master, or loopback on one host."""
    if not has_many_hosts():
        return "127.0.0.1"
    if "HETIS_ADDRESS" in os.environ:
        return os.environ["HETIS_ADDRESS"]
    target = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    family = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: the kernel chooses the route
        return str(probe.getsockname()[0])


def check_world_size(plan: Plan) -> None:
    """Raises ValueError if the number of processes differs from the number of ranks in the plan."""
    world = int(os.environ["WORLD_SIZE"])
    if world != plan.world_size:
        raise ValueError(
            f"the plan has {plan.world_size} ranks but WORLD_SIZE is {world}: "
            f"start {plan.world_size} processes (torchrun --nproc-per-node) or change --plan."
        )
