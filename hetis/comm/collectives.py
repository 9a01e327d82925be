"""Communication among primaries: sums, logits and drawn tokens within a stage, hidden states from stage to stage.

Every rank adds in rank order, so that all ranks of a stage hold the same bits in every run.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetis.comm.links.base import Link
from hetis.comm.process_groups import lost_peer

SHARED_SUM_BYTES = 1 << 16  # from this size on, three or more ranks reduce-scatter and all-gather


class TensorParallel(ABC):
    """Tensor-parallel group of one stage. Operations raise ConnectionError, naming ranks, when a rank is lost."""

    index: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> None:
        """Replaces contiguous `x` (any shape; fp32, bf16, fp16) on every rank by the sum over ranks.

        The sum is taken in fp32 and rounded once.
        """

    @abstractmethod
    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        """Columns of all ranks side by side on index 0, None elsewhere. `widths`: number of columns of each rank."""

    @abstractmethod
    def broadcast(self, x: Tensor) -> None:
        """Replaces contiguous `x`, whose shape and dtype are the same on every rank, by that of index 0."""

    @abstractmethod
    def close(self) -> None:
        """Leaves the group."""


class SingleRank(TensorParallel):
    """Stage of one rank."""

    index, size = 0, 1

    def all_reduce(self, x: Tensor) -> None:
        pass

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x_NV.shape[1] == widths[0]
        return x_NV

    def broadcast(self, x: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class GroupTensorParallel(TensorParallel):
    """Tensor parallelism over a process group: NCCL between GPUs, gloo between CPU ranks on different hosts."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        """`ranks`: global ranks of the members, for error messages."""
        self.index, self.size = group.rank(), group.size()
        self._group = group
        self._others = "ranks " + ", ".join(str(rank) for i, rank in enumerate(ranks) if i != self.index)

    def all_reduce(self, x: Tensor) -> None:
        """Sums by NCCL for two ranks, with one possible order and one rounding. For more ranks NCCL would add in the
        dtype and in ring order, so the parts are gathered and summed here."""
        if x.numel() == 0:
            return
        with lost_peer(self._others):
            if x.is_cuda and self.size == 2:
                self._group.allreduce([x]).wait()
            elif self.size > 2 and x.numel() * x.element_size() >= SHARED_SUM_BYTES:
                self._sum_shares(x.view(-1))
            else:
                parts_RN = x.new_empty(self.size, x.numel())
                self._group._allgather_base(_bytes(parts_RN), _bytes(x)).wait()
                sum_in_order(parts_RN.unbind(), x.view(-1))

    def _sum_shares(self, x_N: Tensor) -> None:
        """Reduce-scatter, then all-gather: every rank sums one share of `x_N`. Sends as many bytes as a ring would."""
        size = -(-x_N.numel() // self.size)
        whole_RN = x_N.new_empty(self.size, size)
        whole_RN.view(-1)[: x_N.numel()] = x_N
        parts_RN, mine_N = torch.empty_like(whole_RN), x_N.new_empty(size)
        self._group.alltoall_base(_bytes(parts_RN), _bytes(whole_RN), [], []).wait()
        sum_in_order(parts_RN.unbind(), mine_N)
        self._group._allgather_base(_bytes(whole_RN), _bytes(mine_N)).wait()
        x_N.copy_(whole_RN.view(-1)[: x_N.numel()])

    def gather_columns(self, x_NV: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x_NV.shape[1] == widths[self.index]
        if len(x_NV) == 0:
            return x_NV.new_empty(0, sum(widths)) if self.index == 0 else None
        mine_B = _bytes(x_NV.contiguous())
        send_sizes = [len(mine_B), *[0] * (self.size - 1)]
        column_bytes = len(x_NV) * x_NV.element_size()
        recv_sizes = [column_bytes * width for width in widths] if self.index == 0 else [0] * self.size
        whole_B = mine_B.new_empty(sum(recv_sizes))
        with lost_peer(self._others):
            self._group.alltoall_base(whole_B, mine_B, recv_sizes, send_sizes).wait()
        if self.index > 0:
            return None
        parts = [part.view(x_NV.dtype).view(len(x_NV), -1) for part in torch.split(whole_B, recv_sizes) if len(part)]
        return torch.cat(parts, dim=1)

    def broadcast(self, x: Tensor) -> None:
        if x.numel():
            with lost_peer(self._others):
                self._group.broadcast(_bytes(x), 0).wait()

    def connect(self, device: torch.device) -> None:
        """Runs each operation once, in which NCCL makes its communicator. `device`: that of later tensors."""
        ones_11 = torch.ones(1, 1, device=device)
        self.all_reduce(ones_11)
        assert float(ones_11) == self.size, f"a sum of {self.size} ones is {float(ones_11)}"
        self.gather_columns(ones_11, [1] * self.size)
        self.broadcast(ones_11)

    def close(self) -> None:
        self._group = None


class StagedTensorParallel(TensorParallel):
    """CUDA rank of a CPU group, for stages of unlike devices or with several ranks on one GPU."""

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

    def broadcast(self, x: Tensor) -> None:
        host = x.cpu()
        self._inner.broadcast(host)
        x.copy_(host)

    def close(self) -> None:
        self._inner.close()


class Pipeline:
    """Transfer of hidden states from the previous stage to this rank, and from it to the next stage.

    All ranks of a stage hold the same hidden states. Index j of a stage receives them from index j modulo P of the P
    ranks of the previous stage, over a link of its own; stages may differ in size.
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
        """Sends `hidden_TH` to the ranks of the next stage that receive from this rank."""
        for link in self._following:
            message = link.send_buffer(hidden_TH.numel() * hidden_TH.element_size())
            message.view(self._dtype).view(hidden_TH.shape).copy_(hidden_TH)
            link.send()

    def recv(self, num_tokens: int) -> Tensor:
        """Hidden states [T, H] of the previous stage, in a new tensor."""
        assert self._previous is not None, "there is no stage before the first one"
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
        torch.add(parts[0], parts[1], out=out)  # adds in fp32 for every dtype
        return
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)


def _bytes(x: Tensor) -> Tensor:
    """Flat view of `x` as bytes, which gloo and NCCL transfer for every dtype."""
    return x.view(-1).view(torch.uint8)
