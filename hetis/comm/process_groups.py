"""torch.distributed process groups of our own: made from a store, no global group, so that ranks may join and leave."""

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
    """The group `name` of `size` members, seen from member `index`: NCCL for a CUDA device, else gloo.

    All members must call it. `address`: of this host, for gloo to listen on; "": as its name resolves. `num_ctas`:
    thread blocks of an NCCL kernel; None: as many as NCCL likes. TimeoutError, naming the rendezvous key, for a member
    that does not come within `timeout`.

    NCCL makes a communicator in a group's first operation, and waits for the others without a limit: hence all show up
    here first, and the caller then uses the group once (`greet`). Its stream has high priority: a message of a few
    microseconds must not wait until a grid of attention, for which it should not wait at all, leaves a place.
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
def lost_peer(who: str) -> Iterator[None]:
    """Turns torch.distributed's errors into a ConnectionError that names `who`."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"the connection to {who} was lost: {str(error).partition(chr(10))[0]}") from None
