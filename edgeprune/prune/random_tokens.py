"""Random visual tokens: the baseline every score must beat.

A seeded, fixed subset of grid positions enters the projector; the choice is made once, at export, and is the same for
every tile (IVTP, Table 1 "Random", applied after the vision tower).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.prune.method import ModelGeometry, PruningMethod, check_tokens_are_patches
from edgeprune.prune.token_budget import check_budget, tokens_to_keep


@dataclass(frozen=True)
class RandomTokens(PruningMethod):
    """Parameters of the random baseline.

    Attributes:
        keep: Visual tokens kept per tile; 0 = by ``keep_ratio``.
        keep_ratio: Share of them kept.
        seed: Seed of NumPy's PCG64 generator.
    """

    keep: int = 0
    keep_ratio: float = 0.25
    seed: int = 0

    name: ClassVar[str] = "random"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ivtp-table-1": {"keep": 64}}

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        if self.seed < 0:
            raise PruningError(f"random: 'seed' is {self.seed}, expected at least 0")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse to keep more tokens than there are."""
        check_tokens_are_patches(self.name, geometry)
        self.tokens_per_tile(geometry)

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector."""
        return tokens_to_keep(self.name, self.keep, self.keep_ratio, geometry.num_patches)

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "FixedPatches":
        """The choice."""
        del tower
        return FixedPatches(self.slots(geometry))

    def slots(self, geometry: ModelGeometry) -> tuple[int, ...]:
        """The kept grid positions, ascending."""
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(geometry.num_patches)
        return tuple(sorted(int(slot) for slot in order[: self.tokens_per_tile(geometry)]))


class FixedPatches(nn.Module):
    """Keeps the same patches of every tile."""

    counted = False
    chosen: Tensor

    def __init__(self, slots: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.tensor(slots, dtype=torch.int64), persistent=False)

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """Drop the other patch tokens."""
        features = vision.hidden[:, 1:].index_select(1, self.chosen)
        return FeatureTokens(features, vision.slots.index_select(1, self.chosen), None)
