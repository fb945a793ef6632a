"""PruMerge+: PruMerge with patches sampled over the whole picture beside those that stand out.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (2024), and
42Shawn/LLaVA-PruMerge at 097c041: with a share r of patches that stand out, every ⌊⌊1/r⌋/3⌋-th patch, row by row, stays
too, the very last one excepted. See :mod:`edgeprune.prune.prumerge` for the rest.

Choices: shares above a third, where the authors' code divides by zero, sample every patch; a patch is never kept twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune.models.clip import ClipVisionTower
from edgeprune.prune.method import ModelGeometry
from edgeprune.prune.prumerge import ClassReader, PruMerge, PruMergePruner


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Parameters of PruMerge+; the same as of PruMerge, with the share of patches that stand out."""

    name: ClassVar[str] = "prumerge-plus"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"keep_ratio": 0.0}}

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector, at most: samples may coincide with what stands out."""
        fixed = self._fixed(geometry)
        if fixed is None:
            return geometry.num_patches
        sampled = len(range(0, geometry.num_patches - 1, max(1, geometry.num_patches // fixed // 3)))
        return min(fixed + sampled + 1, geometry.num_patches)

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "PruMergePlusPruner":
        """The choice and the merging."""
        # How many samples coincide with what stands out depends on the picture.
        reader = ClassReader(tower, geometry.vision_layers)
        left = self.tokens_per_tile(geometry)
        return PruMergePlusPruner(reader, self._fixed(geometry), self.neighbours, left, counted=True)


def sampled_beside(chosen: Tensor) -> Tensor:
    """The patches that are sampled beside the chosen ones, [M, N] bool: every ⌊⌊N/count⌋/3⌋-th, but the last."""
    num_patches = chosen.shape[1]
    count = chosen.sum(dim=1, keepdim=True)
    stride = (torch.full_like(count, num_patches) // count // 3).clamp(min=1)
    places = torch.arange(num_patches, device=chosen.device)
    return (places % stride == 0) & (places < num_patches - 1)


class PruMergePlusPruner(PruMergePruner):
    """Keeps what stands out and samples of the rest."""

    def chosen(self, attention: Tensor) -> Tensor:
        """The patches that stay, [M, N] bool."""
        outlying = super().chosen(attention)
        return outlying | sampled_beside(outlying)
