"""What primaries say to each other: sums and logits within a stage, hidden states from one stage to the next.

Sums are taken in rank order on every rank (NCCL excepted), so all ranks of a stage hold the same bits, run after run.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.comm.process_groups import lost_peer


class TensorParallel(ABC):
    """The ranks of one stage. `ConnectionError`, naming ranks, when one of them is lost."""

    index: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> None:
        """Replaces contiguous `x` (any shape; fp32, bf16, fp16) on every rank by the sum over ranks.

        The sum is taken in fp32 and rounded once.
        """

    @abstractmethod
    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        """Columns of all ranks side by side on index 0, None elsewhere. `widths`: of each rank, any, summing to V."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the group."""


class Alone(TensorParallel):
    """A stage of one rank."""

    index, size = 0, 1

    def all_reduce(self, x: Tensor) -> None:
        pass

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x_NV.shape[1] == widths[0]
        return x_NV

    def close(self) -> None:
        pass


class GroupTensorParallel(TensorParallel):
    """Over a process group: NCCL between GPUs, gloo between CPU ranks on different hosts."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        """`ranks`: global ranks of the members, for messages."""
        self.index, self.size = group.rank(), group.size()
        self._group = group
        self._others = "ranks " + ", ".join(str(rank) for i, rank in enumerate(ranks) if i != self.index)

    def all_reduce(self, x: Tensor) -> None:
        with lost_peer(self._others):
            if x.is_cuda:
                self._group.allreduce([x]).wait()
            elif x.numel() > 0:
                parts = [torch.empty_like(x) for _ in range(self.size)]
                self._group.allgather([[_bytes(part) for part in parts]], [_bytes(x)]).wait()
                sum_in_order(parts, x)

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x_NV.shape[1] == widths[self.index]
        if len(x_NV) == 0:
            return x_NV.new_empty(0, sum(widths)) if self.index == 0 else None
        with lost_peer(self._others):
            if self.index > 0:
                if widths[self.index] > 0:
                    self._group.send([_bytes(x_NV.contiguous())], 0, 0).wait()
                return None
            parts = [x_NV] + [x_NV.new_empty(len(x_NV), width) for width in widths[1:]]
            for peer in range(1, self.size):
                if widths[peer] > 0:
                    self._group.recv([_bytes(parts[peer])], peer, 0).wait()
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        self._group = None


class StagedTensorParallel(TensorParallel):
    """A CUDA rank of a CPU group: ranks of unlike devices, or several on one GPU."""

    def __init__(self, inner: TensorParallel, device: torch.device) -> None:
        self.index, self.size = inner.index, inner.size
        self._inner, self._device = inner, device

    def all_reduce(self, x: Tensor) -> None:
        host = x.cpu()
        self._inner.all_reduce(host)
        x.copy_(host)

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        gathered = self._inner.gather_columns(x_NV.cpu(), widths)
        return None if gathered is None else gathered.to(self._device)

    def close(self) -> None:
        self._inner.close()


class Pipeline:
    """This rank's place between the previous stage and the next one.

    All ranks of a stage hold the same hidden states, so rank j of a stage gets them from rank j modulo P of the P ranks
    before it, over a link of its own; stages may have different numbers of ranks.
    """

    def __init__(
        self,
        previous: Link | None,
        following: Sequence[Link],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._previous, self._following = previous, tuple(following)
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device

    def send(self, hidden_TH: Tensor) -> None:
        """Hands `hidden_TH` on to the ranks of the next stage that this rank serves."""
        for link in self._following:
            message = link.send_buffer(hidden_TH.numel() * hidden_TH.element_size())
            message.view(self._dtype).view(hidden_TH.shape).copy_(hidden_TH)
            link.send()

    def recv(self, num_tokens: int) -> Tensor:
        """hidden_TH of the previous stage; the caller's own."""
        assert self._previous is not None, "the first stage has nobody before it"
        hidden_TH = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        message = self._previous.recv(hidden_TH.numel() * hidden_TH.element_size())
        hidden_TH.copy_(message.view(self._dtype).view(hidden_TH.shape))
        self._previous.release()
        return hidden_TH

    def close(self) -> None:
        for link in (self._previous, *self._following):
            if link is not None:
                link.close()


def sum_in_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """out = parts[0] + parts[1] + ..., from the left in fp32, rounded once to out's dtype. `out` may be one of them."""
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)  # which computes in fp32 whatever the dtype
        return
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)


def _bytes(x: Tensor) -> Tensor:
    """Gloo and NCCL need not know our dtypes."""
    return x.view(-1).view(torch.uint8)
