"""TopK: keep the patches most similar to the class token, inside the vision tower or behind it.

A baseline of Huang et al., "IVTP: Instruction-Guided Visual Token Pruning for Large Vision-Language Models" (ECCV
2024), Tables 1 and 9: "TopK" ranks patches by their similarity with the class token. Its printed costs fit a
selection inside the tower, equally many tokens in every layer. The similarity is the cosine of hidden states; inside
the tower, of those between a layer's attention and its MLP. Training-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens, keep_patches
from edgeprune.prune.ivtp import ascending_top_k, equal_steps
from edgeprune.prune.method import (
    ModelGeometry,
    PruningMethod,
    check_has_class_token,
    check_tokens_are_patches,
)
from edgeprune.prune.token_budget import check_budget, check_place, tokens_to_keep


@dataclass(frozen=True)
class TopK(PruningMethod):
    """Parameters of TopK.

    Attributes:
        keep: Visual tokens kept per tile; 0 = by ``keep_ratio``.
        keep_ratio: Share of them kept.
        at: "vit", in equal steps over the tower's layers, or "projector", behind the tower.
    """

    keep: int = 0
    keep_ratio: float = 0.25
    at: str = "vit"

    name: ClassVar[str] = "topk"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ivtp-table-1": {"keep": 64}}

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        check_place(self.name, self.at)

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, or more tokens than there are."""
        check_has_class_token(self.name, geometry)
        check_tokens_are_patches(self.name, geometry)
        self.tokens_per_tile(geometry)

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector."""
        return tokens_to_keep(self.name, self.keep, self.keep_ratio, geometry.num_patches)

    def vision_pruner(self, geometry: ModelGeometry) -> "TopKInTower | None":
        """The selection inside the tower."""
        if self.at != "vit":
            return None
        left = self.tokens_per_tile(geometry)
        return TopKInTower(equal_steps(geometry.num_patches, left, geometry.vision_layers))

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "TopKBehindTower | None":
        """The selection behind the tower."""
        del tower
        return None if self.at == "vit" else TopKBehindTower(self.tokens_per_tile(geometry))


def class_similarity(hidden: Tensor) -> Tensor:
    """Cosine of every patch with the class token, [M, 1 + N, C] → [M, N] float32."""
    rows = hidden.float()
    direction = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    cosine: Tensor = (direction[:, 1:] * direction[:, :1]).sum(dim=-1)
    return cosine


class TopKInTower(nn.Module):
    """Drops the least similar patches in every layer."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = tuple(counts)

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens left behind this layer's attention."""
        return self.counts[layer]

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Keep as many as this layer leaves."""
        del history
        return keep_patches(tokens, ascending_top_k(class_similarity(tokens.hidden), self.counts[layer]))


class TopKBehindTower(nn.Module):
    """Keeps the most similar patches."""

    counted = False

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """Select."""
        kept = ascending_top_k(class_similarity(vision.hidden), self.keep)
        rows = kept.unsqueeze(-1).expand(-1, -1, vision.hidden.shape[-1])
        return FeatureTokens(vision.hidden[:, 1:].gather(1, rows), vision.slots.gather(1, kept), None)
