"""What methods need that prune every grid of visual tokens by itself."""

import torch
from torch import Tensor

from edgeprune import tensor_names

PER_GRID = (tensor_names.GRID_IDS, tensor_names.GRID_KEEP, tensor_names.VISUAL_PLACES)
"""Host inputs that say which grid a token is of, and how many each grid keeps."""


def rows_grids(visual_slots: Tensor, places: Tensor) -> Tensor:
    """The grid of every row, -1 for text.

    Shapes:
        visual_slots: [S] int64; places: [P, 5] by slot; returns [S] int64.
    """
    grid = places[:, 0].index_select(0, visual_slots.clamp(min=0))
    return torch.where(visual_slots >= 0, grid, -1)
