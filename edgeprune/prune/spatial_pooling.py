"""Spatial pooling: neighbouring patches behind the vision tower are averaged into a coarser grid.

A baseline of Huang et al., "IVTP: Instruction-Guided Visual Token Pruning for Large Vision-Language Models" (ECCV
2024), Table 1: 24 × 24 patches become 8 × 8 tokens. Windows are those of adaptive average pooling, which overlap
where the sides do not divide: the i-th of S windows over R rows reaches from ⌊i·R/S⌋ to ⌈(i+1)·R/S⌉. A pooled token
stands at the middle of its window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.prune.method import ModelGeometry, PruningMethod, check_tokens_are_patches


@dataclass(frozen=True)
class SpatialPooling(PruningMethod):
    """Parameters of spatial pooling.

    Attributes:
        rows: Rows of the pooled grid.
        columns: Its columns.
    """

    rows: int = 8
    columns: int = 8

    name: ClassVar[str] = "spatial-pooling"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ivtp-table-1": {"rows": 8, "columns": 8}}

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a grid that is larger than the model's."""
        check_tokens_are_patches(self.name, geometry)
        for parameter, size in zip(("rows", "columns"), geometry.grid, strict=True):
            if not 1 <= getattr(self, parameter) <= size:
                raise PruningError(
                    f"spatial-pooling: '{parameter}' is {getattr(self, parameter)}, "
                    f"this model's tiles allow 1 … {size}"
                )

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector."""
        del geometry
        return self.rows * self.columns

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "PoolingPruner":
        """The averaging."""
        del tower
        return PoolingPruner(geometry.grid, (self.rows, self.columns))


def window(index: int, size: int, num_windows: int) -> range:
    """The rows of one of ``num_windows`` windows over ``size`` rows."""
    return range(index * size // num_windows, -(-(index + 1) * size // num_windows))


def averaging(size: int, num_windows: int) -> Tensor:
    """The matrix that averages windows, [num_windows, size] float32."""
    matrix = torch.zeros(num_windows, size)
    for index in range(num_windows):
        covered = window(index, size, num_windows)
        matrix[index, covered.start : covered.stop] = 1 / len(covered)
    return matrix


class PoolingPruner(nn.Module):
    """Averages windows of the grid."""

    counted = False
    over_rows: Tensor
    over_columns: Tensor
    middles: Tensor

    def __init__(self, grid: tuple[int, int], pooled: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("over_rows", averaging(grid[0], pooled[0]), persistent=False)
        self.register_buffer("over_columns", averaging(grid[1], pooled[1]), persistent=False)
        rows, columns = (
            [(covered.start + covered.stop - 1) // 2 for i in range(n) for covered in [window(i, size, n)]]
            for size, n in zip(grid, pooled, strict=True)
        )
        middles = torch.tensor([row * grid[1] + column for row in rows for column in columns])
        self.register_buffer("middles", middles, persistent=False)

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """Pool."""
        patches = vision.hidden[:, 1:]
        num_tiles, _, width = patches.shape
        rows, columns = self.grid
        by_row = patches.float().reshape(num_tiles, rows, columns * width)
        pooled = (self.over_rows @ by_row).reshape(num_tiles, -1, columns, width)
        features = (self.over_columns @ pooled).flatten(1, 2).to(patches.dtype)
        return FeatureTokens(features, vision.slots.index_select(1, self.middles), None)
