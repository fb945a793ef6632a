"""VisionZip: behind the vision tower, the patches the class token attends to, and clusters of the others.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025), and
dvlab-research/VisionZip at 3151f6d. Dominant tokens are the class token itself and the patches with the highest sum
over heads of its attention in the last layer that runs. Of the others, every n-th becomes a contextual token, to
which the mean of those most similar to it (keys of that layer, mean over heads, cosine) is added. Training-free.

Choice: every visual token needs a place in the picture. The class token takes that of the best patch that is neither
dominant nor contextual.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.models.vision_pruning import TowerAttention
from edgeprune.prune.method import (
    ModelGeometry,
    PruningMethod,
    check_has_class_token,
    check_tokens_are_patches,
)


@dataclass(frozen=True)
class VisionZip(PruningMethod):
    """Parameters of VisionZip.

    Attributes:
        dominant: Dominant tokens of a tile, the class token counted.
        contextual: Contextual tokens of a tile.
    """

    dominant: int = 191
    contextual: int = 30

    name: ClassVar[str] = "visionzip"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "upstream": {"dominant": 191, "contextual": 30},
        "192": {"dominant": 162, "contextual": 30},
        "128": {"dominant": 108, "contextual": 20},
        "64": {"dominant": 54, "contextual": 10},
    }

    def __post_init__(self) -> None:
        for parameter in ("dominant", "contextual"):
            if getattr(self, parameter) < 1:
                raise PruningError(
                    f"visionzip: '{parameter}' is {getattr(self, parameter)}, allowed: 1 or more"
                )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, or more tokens than there are."""
        check_has_class_token(self.name, geometry)
        check_tokens_are_patches(self.name, geometry)
        # One patch must be left over to give the class token its place.
        if self.dominant + self.contextual > geometry.num_patches:
            raise PruningError(
                f"visionzip: {self.dominant} 'dominant' and {self.contextual} 'contextual' tokens, but a tile has "
                f"{geometry.num_patches} visual tokens"
            )

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector."""
        del geometry
        return self.dominant + self.contextual

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "VisionZipPruner":
        """The choice and the clustering."""
        del geometry, tower
        return VisionZipPruner(self.dominant, self.contextual)


def class_scores(attention: TowerAttention) -> Tensor:
    """Sum over heads of the class token's attention to the patches, [M, N] float32."""
    query, key = attention.query[:, :, :1].float(), attention.key.float()
    logits = query @ key.transpose(2, 3) * (1 / math.sqrt(query.shape[-1]))
    scores: Tensor = logits.softmax(dim=-1)[:, :, 0, 1:].sum(dim=1)
    return scores


def add_similar(features: Tensor, metric: Tensor, num_targets: int) -> tuple[Tensor, Tensor]:
    """Every n-th token with the mean of the others that are most similar to it added.

    Shapes:
        features: [M, R, C]; metric: [M, R, D] float32; returns [M, num_targets, C] float32 and the targets' indices.
    """
    num_rows = features.shape[1]
    stride = max(1, num_rows // num_targets)
    targets = torch.arange(num_rows, device=features.device)[::stride][:num_targets]
    is_target = torch.zeros(num_rows, dtype=torch.bool, device=features.device).index_fill(0, targets, True)
    direction = metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    likeness = direction @ direction.index_select(1, targets).transpose(1, 2)
    nearest = likeness.argmax(dim=2, keepdim=True)
    joins = (nearest == torch.arange(num_targets, device=features.device)) & ~is_target[None, :, None]
    share = joins.float().transpose(1, 2)
    mean = share @ features.float() / share.sum(dim=2, keepdim=True).clamp(min=1)
    return features.index_select(1, targets).float() + mean, targets


class VisionZipPruner(nn.Module):
    """Keeps dominant tokens and clusters the others."""

    counted = False

    def __init__(self, dominant: int, contextual: int) -> None:
        super().__init__()
        self.dominant = dominant
        self.contextual = contextual

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """The class token, dominant patches in the order of the picture, contextual tokens."""
        assert vision.attention is not None  # the method refuses a tower without layers
        patches = vision.hidden[:, 1:]
        scores = class_scores(vision.attention)
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        kept = order[:, : self.dominant - 1].sort(dim=1).values
        rest = order[:, self.dominant - 1 :].sort(dim=1).values

        def take(x: Tensor, rows: Tensor) -> Tensor:
            return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

        metric = vision.attention.key[:, :, 1:].float().mean(dim=1)
        contextual, targets = add_similar(take(patches, rest), take(metric, rest), self.contextual)
        context_places = rest.index_select(1, targets)
        free = scores.scatter(1, kept, torch.full_like(kept, -1, dtype=scores.dtype))
        free = free.scatter(1, context_places, torch.full_like(context_places, -1, dtype=scores.dtype))
        places = torch.cat((free.argmax(dim=1, keepdim=True), kept, context_places), dim=1)
        features = torch.cat((vision.hidden[:, :1], take(patches, kept), contextual.to(patches.dtype)), dim=1)
        return FeatureTokens(features, vision.slots.gather(1, places), None)
