"""ToMe: in every layer of the vision tower, the r most similar pairs of tokens are merged.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), and facebookresearch/ToMe at af95e4b. Between attention
and MLP of each layer, tokens are split alternately into A and B, every token of A finds its most similar one in B
(cosine of the keys, mean over heads), and the r most similar of A are averaged into theirs, weighted by how many tokens
each stands for. Attention counts a token as often as it stands for (log size added to its logits). The class token is
never merged away. Training-free.

The output is in the order of the authors' code: what is left of A, the class token first, then B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens
from edgeprune.prune.method import (
    ModelGeometry,
    PruningMethod,
    check_has_class_token,
    check_tokens_are_patches,
)


@dataclass(frozen=True)
class Tome(PruningMethod):
    """Parameters of ToMe.

    Attributes:
        r: Tokens merged away in every layer, at most half of those that are left.
    """

    r: int = 16

    name: ClassVar[str] = "tome"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llmc": {"r": 16},
        "ivtp-table-1": {"r": 22},
    }

    def __post_init__(self) -> None:
        if self.r < 1:
            raise PruningError(f"tome: 'r' is {self.r}, allowed: 1 or more")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, or without layers."""
        check_has_class_token(self.name, geometry)
        check_tokens_are_patches(self.name, geometry)

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that leave the tower."""
        return self._counts(geometry)[-1]

    def vision_pruner(self, geometry: ModelGeometry) -> "TomePruner":
        """The merging in the tower."""
        return TomePruner(self._counts(geometry))

    def _counts(self, geometry: ModelGeometry) -> list[int]:
        """Patch tokens behind every layer."""
        counts, count = [], geometry.num_patches
        for _ in range(geometry.vision_layers):
            # Of the 1 + count tokens, the class token stays.
            count -= min(self.r, count // 2)
            counts.append(count)
        return counts


class TomePruner(nn.Module):
    """Merges similar tokens after every attention."""

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = tuple(counts)

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens left behind this layer."""
        return self.counts[layer]

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Merge as many tokens as this layer gives up."""
        merged = tokens.slots.shape[1] - self.counts[layer]
        return merge_similar(history[-1].key.float().mean(dim=1), tokens, merged)


def merge_similar(metric: Tensor, tokens: TowerTokens, num_merged: int) -> TowerTokens:
    """Bipartite soft matching.

    Args:
        metric: [M, 1 + K, D], what similarity is measured on.
        tokens: The tokens, the class token first.
        num_merged: How many tokens of A are merged into B; at most all but the class token.
    """
    if num_merged == 0:
        return tokens
    direction = metric / metric.norm(dim=-1, keepdim=True)
    scores = direction[:, ::2] @ direction[:, 1::2].transpose(1, 2)
    first = torch.arange(scores.shape[1], device=scores.device) == 0
    scores = torch.where(first[None, :, None], -torch.inf, scores)
    best, partner = scores.amax(dim=2), scores.argmax(dim=2)
    order = torch.sort(best, dim=1, descending=True, stable=True).indices
    merged, left = order[:, :num_merged], order[:, num_merged:].sort(dim=1).values
    target = partner.gather(1, merged)

    sizes = tokens.sizes if tokens.sizes is not None else torch.ones_like(metric[:, :, 0])
    weighted = tokens.hidden.float() * sizes.unsqueeze(-1)
    width = weighted.shape[-1]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        """A's tokens that are left, and B with those merged into it; x: [M, 1 + K, C]."""
        a, b = x[:, ::2], x[:, 1::2]
        size = x.shape[-1]
        gone = a.gather(1, merged.unsqueeze(-1).expand(-1, -1, size))
        # As a product: TensorRT takes no scatter that adds.
        into = target.unsqueeze(1) == torch.arange(b.shape[1], device=b.device)[None, :, None]
        return a.gather(1, left.unsqueeze(-1).expand(-1, -1, size)), b + into.to(b.dtype) @ gone

    both = torch.cat(split(torch.cat((weighted, sizes.unsqueeze(-1)), dim=2)), dim=1)
    new_sizes = both[:, :, width]
    hidden = (both[:, :, :width] / both[:, :, width:]).to(tokens.hidden.dtype)
    # The class token has no slot; -1 keeps its place until the end.
    slots = torch.cat((torch.full_like(tokens.slots[:, :1], -1), tokens.slots), dim=1)
    new_slots = torch.cat((slots[:, ::2].gather(1, left), slots[:, 1::2]), dim=1)
    return TowerTokens(hidden, new_slots[:, 1:], new_sizes)
