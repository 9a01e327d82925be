"""Process groups of torch.distributed, made from a store without a global group, so that ranks can join and leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from hetis.comm.rendezvous import Rendezvous


def make_process_group(
    rendezvous: Rendezvous,
    name: str,
    index: int,
    size: int,
    device: torch.device,
    timeout: timedelta,
    address: str = "",
    *,
    num_ctas: int | None = None,
) -> Any:
    """Group `name` of `size` members, as member `index`: NCCL for a CUDA device, else gloo.

    All members must call it. `address`: of this host, for gloo to listen on; "": as the host's name resolves.
    `num_ctas`: thread blocks of an NCCL kernel; None: NCCL's default. TimeoutError, naming the rendezvous key, for a
    member that does not call within `timeout`.

    NCCL makes a communicator in a group's first operation and waits there for the other members without a limit. Hence
    members wait for each other here first, and callers then run an operation at once (`connect`). NCCL's stream has
    high priority: a message of a few microseconds must not queue behind an attention kernel that it does not depend on.
    """
    rendezvous.set(f"{name}/here/{index}", b"")
    for member in range(size):
        rendezvous.get(f"{name}/here/{member}", timeout.total_seconds())
    prefixed = distributed.PrefixStore(name, rendezvous.store)
    if device.type == "cuda":
        options = distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout
        if num_ctas is not None:
            options.config.min_ctas = options.config.max_ctas = num_ctas
        return distributed.ProcessGroupNCCL(prefixed, index, size, options)
    options = distributed.ProcessGroupGloo._Options()
    options._timeout = timeout
    gloo = distributed.ProcessGroupGloo
    options._devices = [gloo.create_device(hostname=address) if address else gloo.create_default_device()]
    return gloo(prefixed, index, size, options)


@contextmanager
def lost_peer(peer: str) -> Iterator[None]:
    """Context that turns errors of torch.distributed into a ConnectionError that names `peer`."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"the connection to {peer} was lost: {str(error).partition(chr(10))[0]}") from None
