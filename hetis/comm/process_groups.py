"""torch.distributed process groups of our own: made from a store, no global group, so that ranks may join and leave."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


def make_process_group(
    store: Any, name: str, index: int, size: int, device: torch.device, timeout: timedelta, address: str = ""
) -> Any:
    """The group `name` of `size` members, seen from member `index`: NCCL for a CUDA device, else gloo.

    All members must call it. `address`: of this host, for gloo to listen on; "": as its name resolves.
    """
    prefixed = distributed.PrefixStore(name, store)
    if device.type == "cuda":
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
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
