"""PruMerge: behind the vision tower, patches that stand out in the class token's attention stay and collect the others.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (2024), and
42Shawn/LLaVA-PruMerge at 097c041. The class token's attention comes from the layer behind the features (CLIP's last),
as one head over its whole width. Patches above the third quartile plus 1.5 interquartile ranges stay, so their number
depends on the picture. Each takes up its 32 nearest patches (cosine of that layer's keys), weighted by their attention,
and all patches that do not stay become one more token, their sum weighted alike (not normalised, as in the authors'
code). Training-free.

Choices: every picture has its own number (the authors' batch shares one); kept tokens stand in the order of the
picture, not of their attention, and the extra token last, at the slot of the best patch that was dropped. If no patch
stands out, the best one stays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.clip import ClipVisionTower, FeatureTokens, VisionOutput
from edgeprune.prune.method import (
    ModelGeometry,
    PruningMethod,
    check_has_class_token,
    check_tokens_are_patches,
)
from edgeprune.prune.token_budget import tokens_to_keep


@dataclass(frozen=True)
class PruMerge(PruningMethod):
    """Parameters of PruMerge.

    Attributes:
        keep_ratio: Share of the patches that stays; 0 = those that stand out, a number that depends on the picture.
        neighbours: Nearest patches that each kept one takes up.
    """

    keep_ratio: float = 0.0
    neighbours: int = 32

    name: ClassVar[str] = "prumerge"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"keep_ratio": 0.0},
        "fixed": {"keep_ratio": 0.125},
    }

    def __post_init__(self) -> None:
        if not 0 <= self.keep_ratio <= 1:
            raise PruningError(
                f"{self.name}: 'keep_ratio' is {self.keep_ratio}, allowed: above 0, up to 1 (share kept), or 0 to keep "
                "what stands out"
            )
        if self.neighbours < 1:
            raise PruningError(f"{self.name}: 'neighbours' is {self.neighbours}, allowed: 1 or more")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, or one whose patches are joined."""
        check_has_class_token(self.name, geometry)
        check_tokens_are_patches(self.name, geometry)

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that enter the projector, at most."""
        chosen = self._fixed(geometry) or geometry.num_patches
        return min(chosen + 1, geometry.num_patches)

    def feature_pruner(self, geometry: ModelGeometry, tower: ClipVisionTower) -> "PruMergePruner":
        """The choice and the merging."""
        reader, fixed = ClassReader(tower, geometry.vision_layers), self._fixed(geometry)
        left = self.tokens_per_tile(geometry)
        return PruMergePruner(reader, fixed, self.neighbours, left, counted=fixed is None)

    def _fixed(self, geometry: ModelGeometry) -> int | None:
        """How many patches stay, if that is known beforehand."""
        if not self.keep_ratio:
            return None
        return tokens_to_keep(self.name, 0, self.keep_ratio, geometry.num_patches)


class ClassView(NamedTuple):
    """What the layer behind the features says of the patches.

    Shapes:
        attention: [M, N] float32, the class token's attention as one head, class token left out.
        keys: [M, N, C] float32.
    """

    attention: Tensor
    keys: Tensor


class ClassReader(nn.Module):
    """Reads the layer behind the features; the last layer, if the features are behind it."""

    def __init__(self, tower: ClipVisionTower, num_feature_layers: int) -> None:
        super().__init__()
        self.behind = num_feature_layers < tower.config.tower.num_layers
        if self.behind:
            layer = tower.encoder.layer(num_feature_layers)
            self.norm = layer.layer_norm1
            self.q_proj, self.k_proj = layer.self_attn.q_proj, layer.self_attn.k_proj

    def forward(self, vision: VisionOutput) -> ClassView:
        """Its attention as one head, and its keys."""
        if self.behind:
            normed = self.norm(vision.hidden)
            query, key = self.q_proj(normed[:, :1]), self.k_proj(normed)
        else:
            assert vision.attention is not None  # the method refuses a tower without layers
            query = vision.attention.query[:, :, :1].transpose(1, 2).flatten(2)
            key = vision.attention.key.transpose(1, 2).flatten(2)
        logits = query.float() @ key.float().transpose(1, 2) / math.sqrt(key.shape[-1])
        return ClassView(logits.softmax(dim=-1)[:, 0, 1:], key[:, 1:].float())


def stands_out(scores: Tensor) -> Tensor:
    """Scores above the third quartile plus 1.5 interquartile ranges, and at least the highest, [M, N] bool.

    Quartiles are interpolated linearly, as NumPy's are.
    """
    last = scores.shape[1] - 1
    ranked = scores.sort(dim=1).values

    def quantile(quarters: int) -> Tensor:
        below, rest = divmod(quarters * last, 4)
        above = min(below + 1, last)
        return ranked[:, below] + (ranked[:, above] - ranked[:, below]) * (rest / 4)

    low, high = quantile(1), quantile(3)
    outlying = scores > (high + 1.5 * (high - low)).unsqueeze(1)
    places = torch.arange(last + 1, device=scores.device)
    return outlying | (places == scores.argmax(dim=1, keepdim=True))


def highest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores, ties to the lower index, [M, N] bool."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(order).scatter(1, order[:, :count], torch.ones_like(order[:, :count]))
    return chosen > 0


def merge_nearest(features: Tensor, keys: Tensor, weights: Tensor, neighbours: int) -> Tensor:
    """Every patch plus the weighted sum of its nearest others.

    Shapes:
        features: [M, N, C]; keys: [M, N, D] float32; weights: [M, N] float32; returns [M, N, C] float32.
    """
    direction = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    likeness = direction @ direction.transpose(1, 2)
    num_patches = keys.shape[1]
    itself = torch.eye(num_patches, dtype=torch.bool, device=keys.device)
    ranked = torch.sort(
        torch.where(itself, -torch.inf, likeness), dim=2, descending=True, stable=True
    ).indices
    nearest = ranked[:, :, : min(neighbours, num_patches - 1)]
    taken = weights.unsqueeze(1).expand(-1, num_patches, -1).gather(2, nearest)
    share = torch.zeros_like(likeness).scatter(2, nearest, taken)
    return features.float() + share @ features.float()


class PruMergePruner(nn.Module):
    """Keeps what stands out and merges the rest."""

    def __init__(
        self,
        reader: ClassReader,
        fixed: int | None,
        neighbours: int,
        tokens_per_tile: int,
        *,
        counted: bool,
    ) -> None:
        """Build the pruner.

        Args:
            reader: Gives attention and keys.
            fixed: Patches that stay because of their attention; None = those that stand out.
            neighbours: Patches that each one takes up.
            tokens_per_tile: Tokens that are left, at most.
            counted: Whether there may be fewer.
        """
        super().__init__()
        self.reader = reader
        self.fixed = fixed
        self.neighbours = neighbours
        self.tokens_per_tile = tokens_per_tile
        self.counted = counted

    def chosen(self, attention: Tensor) -> Tensor:
        """The patches that stay, [M, N] bool."""
        return stands_out(attention) if self.fixed is None else highest(attention, self.fixed)

    def prune_features(self, vision: VisionOutput) -> FeatureTokens:
        """Choose, merge, and append what was not chosen as one token."""
        view: ClassView = self.reader(vision)
        patches = vision.hidden[:, 1:]
        kept = self.chosen(view.attention)
        merged = merge_nearest(patches, view.keys, view.attention, self.neighbours)
        weights = torch.where(kept, 0.0, view.attention)
        extra = weights.unsqueeze(1) @ patches.float()
        best_dropped = torch.where(kept, -torch.inf, view.attention).argmax(dim=1, keepdim=True)

        # Kept tokens in the order of the picture, then the extra one, then what is cut off.
        num_patches = patches.shape[1]
        places = torch.arange(num_patches, device=patches.device)
        number = kept.sum(dim=1)
        order = torch.cat(
            (
                torch.where(kept, places, num_patches + 1 + places),
                torch.full_like(number, num_patches)[:, None],
            ),
            dim=1,
        )
        rows = torch.sort(order, dim=1, stable=True).indices
        tokens = torch.cat((merged, extra), dim=1).to(patches.dtype)
        slots = torch.cat((vision.slots, vision.slots.gather(1, best_dropped)), dim=1)
        # Where all stay there is nothing to make an extra token of.
        counts = number + (number < num_patches).to(number.dtype)
        rows = rows[:, : self.tokens_per_tile]
        return FeatureTokens(
            tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])),
            slots.gather(1, rows),
            counts if self.counted else None,
        )
