"""Device half of the cache: the pages of one rank for one stage, and the table that assigns them to lanes."""

import numpy as np
import torch

from hetis.core.messages.step_command import Int32, Int64, PageEntries
from hetis.core.placement import PoolId


class PagePool:
    """`pages_L2PSD` and page table `table_BW` (B lanes, W pages of a lane) of one stage on one device.

    The table exists twice, for host planning (numpy) and for the kernels; on the CPU both are the same memory. Pages
    are not touched before they are written, so an unused page costs nothing on a host that overcommits.

    A cell is the place of one token in a layer's pages, viewed as [P * S, D].
    """

    def __init__(
        self,
        pool_id: PoolId,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        head_dim: int,
        num_lanes: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.id = pool_id
        self.page_size = page_size
        self.pages_L2PSD = torch.empty(num_layers, 2, num_pages, page_size, head_dim, dtype=dtype, device=device)
        width = -(-max_model_len // page_size)
        self.table_host_BW: Int32 = np.zeros((num_lanes, width), dtype=np.int32)
        host = torch.from_numpy(self.table_host_BW)
        self.table_BW = host if device.type == "cpu" else host.to(device)

    def apply(self, entries: PageEntries) -> None:
        """Writes new entries into the host's page table, which on a CPU is the only one."""
        lane_E, index_E, page_E = entries
        self.table_host_BW[lane_E, index_E] = page_E

    def apply_on_device(self, entry_3E: torch.Tensor) -> None:
        """Writes the same entries, int64 [3, E] on the device, into the table of the kernels."""
        self.table_BW[entry_3E[0], entry_3E[1]] = entry_3E[2].to(torch.int32)

    def cells(self, lane_A: Int64, position_A: Int64) -> Int64:
        """The cells of the tokens at these positions of these lanes."""
        page_A = self.table_host_BW[lane_A, position_A // self.page_size].astype(np.int64)
        return page_A * self.page_size + position_A % self.page_size
