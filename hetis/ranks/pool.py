"""Device half of the cache: the pages of one rank for one stage, and the table that says which lane owns which."""

import numpy as np
import torch
from numpy.typing import NDArray

from hetis.core.messages import PageDelta
from hetis.core.placement import PoolId


class PagePool:
    """`pool_L2PSD` and `page_table_BW` of one stage on one device.

    The table exists twice, for host planning (numpy) and for the kernels; on the CPU both are the same memory. Pages
    are not touched before they are written, so an unused page costs nothing on a host that overcommits.
    """

    def __init__(
        self,
        pool_id: PoolId,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        head_dim: int,
        num_rows: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.id = pool_id
        self.page_size = page_size
        self.pages_L2PSD = torch.empty(num_layers, 2, num_pages, page_size, head_dim, dtype=dtype, device=device)
        width = -(-max_model_len // page_size)
        self.table_host_BW: NDArray[np.int32] = np.zeros((num_rows, width), dtype=np.int32)
        host = torch.from_numpy(self.table_host_BW)
        self.table_BW = host if device.type == "cpu" else host.to(device)

    def apply(self, deltas: list[PageDelta]) -> None:
        """Enter the new pages that are meant for this pool."""
        for delta in deltas:
            if (delta.rank, delta.stage) != (self.id.rank, self.id.stage):
                continue
            rows, columns, pages = np.frombuffer(delta.entries, dtype=np.int32).reshape(-1, 3).T
            self.table_host_BW[rows, columns] = pages
            if self.table_BW.device.type != "cpu":
                index = torch.from_numpy(np.stack([rows, columns]).astype(np.int64)).to(self.table_BW.device)
                self.table_BW[index[0], index[1]] = torch.from_numpy(pages.copy()).to(self.table_BW.device)

    def slots(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in a layer's pages (viewed as [P*S, D]) the tokens at `positions` of the lanes in `rows` lie."""
        pages = self.table_host_BW[rows, positions // self.page_size].astype(np.int64)
        return pages * self.page_size + positions % self.page_size
