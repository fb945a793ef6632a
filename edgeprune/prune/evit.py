"""EViT: the vision tower keeps what the class token attends to, and fuses the rest into one token.

Liang et al., "Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations"
(ICLR 2022), and youweiliang/evit at 5ca95a7. After the attention of each of ``layers``, before its MLP, patches are
ranked by the class token's attention, mean over heads; ⌈keep_ratio · patches⌉ stay, and the others become one token,
their sum weighted by that attention (not normalised, as in the authors' code).

Choices: kept patches stay in the order of the picture (the authors' code orders them by score; a vision transformer
does not mind, a decoder with positions does). The fused token comes last and stands at the best dropped patch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens, keep_patches
from edgeprune.operators.attention_score import attention_score
from edgeprune.prune.method import (
    ModelGeometry,
    PruningMethod,
    check_has_class_token,
    check_tokens_are_patches,
)


@dataclass(frozen=True)
class Evit(PruningMethod):
    """Parameters of EViT.

    Attributes:
        layers: Layers of the vision tower after whose attention tokens are dropped, 0-based, increasing.
        keep_ratio: Share of the patch tokens that stay at each of them.
        fuse: Whether the dropped ones become one token.
    """

    layers: tuple[int, ...] = (3, 6, 9)
    keep_ratio: float = 0.7
    fuse: bool = True

    name: ClassVar[str] = "evit"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-0.7": {"layers": (3, 6, 9), "keep_ratio": 0.7},
        "paper-0.5": {"layers": (3, 6, 9), "keep_ratio": 0.5},
    }

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise PruningError(
                f"evit: 'layers' is {list(self.layers)}: list one or more, increasing, each once"
            )
        if not 0 < self.keep_ratio < 1:
            raise PruningError(f"evit: 'keep_ratio' is {self.keep_ratio}, allowed: above 0, below 1")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, or layers that do not run."""
        check_has_class_token(self.name, geometry)
        check_tokens_are_patches(self.name, geometry)
        last = geometry.vision_layers - 1
        for layer in self.layers:
            if not 0 <= layer <= last:
                raise PruningError(
                    f"evit: layer {layer} is out of range: this vision tower allows layers 0 … {last}"
                )

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that leave the tower."""
        return list(self._counts(geometry).values())[-1]

    def vision_pruner(self, geometry: ModelGeometry) -> "EvitPruner":
        """The selection in the tower."""
        return EvitPruner(self._counts(geometry), fuse=self.fuse)

    def _counts(self, geometry: ModelGeometry) -> dict[int, int]:
        """Patch tokens behind every site, the fused one included."""
        counts, count = {}, geometry.num_patches
        for layer in self.layers:
            keep = math.ceil(round(self.keep_ratio * count, 6))
            count = keep + (1 if self.fuse and keep < count else 0)
            counts[layer] = count
        return counts


class EvitPruner(nn.Module):
    """Ranks patches by the class token's attention."""

    def __init__(self, keep_by_layer: Mapping[int, int], *, fuse: bool) -> None:
        super().__init__()
        self.keep_by_layer = dict(keep_by_layer)
        self.fuse = fuse

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens left at this layer, None where nothing is dropped."""
        return self.keep_by_layer.get(layer)

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Keep the best, fuse the rest."""
        count, left = tokens.slots.shape[1], self.keep_by_layer[layer]
        if left >= count:
            return tokens
        scores = class_attention(history[-1])
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        num_keep = left - 1 if self.fuse else left
        kept = keep_patches(tokens, order[:, :num_keep].sort(dim=1).values)
        if not self.fuse:
            return kept
        dropped = order[:, num_keep:]
        rest = tokens.hidden[:, 1:].gather(1, dropped.unsqueeze(-1).expand(-1, -1, tokens.hidden.shape[-1]))
        weights = scores.gather(1, dropped).unsqueeze(1)
        fused = (weights @ rest.float()).to(tokens.hidden.dtype)
        return TowerTokens(
            torch.cat((kept.hidden, fused), dim=1),
            torch.cat((kept.slots, tokens.slots.gather(1, dropped[:, :1])), dim=1),
        )


def class_attention(attention: TowerAttention) -> Tensor:
    """The class token's attention to the patch tokens, mean over heads, [M, N] float32."""
    query, key = attention.query[:, :, :1], attention.key
    first = torch.zeros(1, dtype=torch.int64, device=query.device)
    one = torch.ones(1, 1, device=query.device)
    scale = 1 / math.sqrt(query.shape[-1])
    return attention_score(query, key, first, one, scale=scale, causal=False)[:, 0, 1:]
