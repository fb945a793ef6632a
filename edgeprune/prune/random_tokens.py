"""Random visual tokens: the baseline every score must beat.

A seeded, fixed subset of grid positions survives; the choice is made once, at export, and is the same for every tile.
A baseline of Huang et al., "IVTP: Instruction-Guided Visual Token Pruning for Large Vision-Language Models" (ECCV
2024), Table 1, whose cost fits a selection inside the tower, equally many tokens in every layer; behind it is
offered, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens, keep_patches
from edgeprune.prune.ivtp import equal_steps
from edgeprune.prune.method import ModelGeometry, PruningMethod, check_tokens_are_patches
from edgeprune.prune.token_budget import check_budget, check_place, tokens_to_keep


@dataclass(frozen=True)
class RandomTokens(PruningMethod):
    """Parameters of the random baseline.

    Attributes:
        keep: Visual tokens kept per tile; 0 = by ``keep_ratio``.
        keep_ratio: Share of them kept.
        seed: Seed of NumPy's PCG64 generator.
        at: "projector", behind the tower, or "vit", in equal steps over the tower's layers.
    """

    keep: int = 0
    keep_ratio: float = 0.25
    seed: int = 0
    at: str = "projector"

    name: ClassVar[str] = "random"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ivtp-table-1": {"keep": 64}}

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        check_place(self.name, self.at)
        if self.seed < 0:
            raise PruningError(f"random: 'seed' is {self.seed}, expected at least 0")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse to keep more tokens than there are."""
        check_tokens_are_patches(self.name, geometry)
        if self.at == "vit" and geometry.vision_layers < 1:
            raise PruningError("random: no layer of this vision tower runs; choose at=projector")
        self.tokens_per_tile(geometry)

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector."""
        return tokens_to_keep(self.name, self.keep, self.keep_ratio, geometry.num_patches)

    def vision_pruner(self, geometry: ModelGeometry) -> "FixedPatchesInTower | None":
        """The choice inside the tower."""
        if self.at != "vit":
            return None
        counts = equal_steps(geometry.num_patches, self.tokens_per_tile(geometry), geometry.vision_layers)
        return FixedPatchesInTower([self.slots(geometry, count) for count in counts], geometry.num_patches)

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "FixedPatches | None":
        """The choice behind the tower."""
        del tower
        return None if self.at == "vit" else FixedPatches(self.slots(geometry))

    def slots(self, geometry: ModelGeometry, count: int | None = None) -> tuple[int, ...]:
        """The grid positions that are left, ascending: ``count`` of them, or those kept in the end."""
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(geometry.num_patches)
        left = self.tokens_per_tile(geometry) if count is None else count
        return tuple(sorted(int(slot) for slot in order[:left]))


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


class FixedPatchesInTower(nn.Module):
    """Keeps the same patches of every tile, fewer from layer to layer."""

    def __init__(self, slots_by_layer: Sequence[tuple[int, ...]], num_patches: int) -> None:
        super().__init__()
        # Indices into the patches that the layer before has left.
        before: tuple[int, ...] = tuple(range(num_patches))
        self.chosen: list[Tensor] = []
        for slots in slots_by_layer:
            self.chosen.append(torch.tensor([before.index(slot) for slot in slots], dtype=torch.int64))
            before = slots

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens left behind this layer's attention."""
        return len(self.chosen[layer])

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Keep those of this layer."""
        del history
        return keep_patches(tokens, self.chosen[layer].expand(tokens.hidden.shape[0], -1))
