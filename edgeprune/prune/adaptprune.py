"""AdaptPrune: keep what the last prompt row attends to, spread over the picture and over what is in it.

Luan et al., "Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models" (2025), and bzluan/AdaptPrune
at d0842f3.
Before layer K, visual tokens are scored by the attention of layer K-1, last row, mean over heads, lowered towards the
borders of the grid by a Gaussian. Then tokens are kept one after the other, and each lowers the scores of near and
similar ones (a soft non-maximum suppression on distance and on the cosine of the keys). Training-free.

Where paper and code differ, or both are silent:
  * K is 3 in the paper and 2 in the code: presets "paper" and "upstream".
  * The keys are those of the code: layer K's key projection on the hidden states that enter the layer, without norm
    and rotary embedding. ``key_source`` "normed" applies the layer's norm first, and its norms of key heads behind it
    (Qwen3), as the layer itself does.
  * The code may choose a token twice where all scores have become zero; the paper says "highest-scoring token that
    hasn't yet been chosen", and so does this. Everything is computed in float32.
  * Suppression does not cross grids, pictures or tiles of them (paper, supplement A); their tokens compete for one
    budget.
  * Grids other than 24 × 24: the Gaussian's σ is half the grid on each axis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.token_select import select_by_soft_nms
from edgeprune.prune.last_row import last_row_attention
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    SiteSelector,
    check_layers_increase,
)
from edgeprune.prune.token_budget import check_budget, site_budget

KEY_SOURCES = ("upstream", "normed")


@dataclass(frozen=True)
class AdaptPrune(PruningMethod):
    """Parameters of AdaptPrune.

    Attributes:
        layer: K, the decoder layer before which tokens are dropped, 0-based.
        keep_ratio: Share of the visual tokens kept.
        keep: Visual tokens kept per picture; 0 = by ``keep_ratio``.
        max_distance: Tokens further away than this, in patches, are not suppressed.
        distance_sigma: σ_d of the suppression by distance, in patches.
        similarity_sigma: σ_s of the suppression by similarity, in cosine.
        key_source: "upstream" (the key projection alone) or "normed" (the layer's keys).
    """

    layer: int = 3
    keep_ratio: float = 0.1
    keep: int = 0
    max_distance: float = 5.0
    distance_sigma: float = 1.5
    similarity_sigma: float = 0.05
    key_source: str = "upstream"

    name: ClassVar[str] = "adaptprune"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"layer": 3, "keep_ratio": 0.1},
        "upstream": {"layer": 2, "keep_ratio": 0.1},
    }

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        for parameter in ("max_distance", "distance_sigma", "similarity_sigma"):
            if not 0 < getattr(self, parameter) < math.inf:
                raise PruningError(
                    f"adaptprune: '{parameter}' is {getattr(self, parameter)}, allowed: above 0"
                )
        if self.key_source not in KEY_SOURCES:
            raise PruningError(
                f"adaptprune: 'key_source' is '{self.key_source}', allowed: {', '.join(KEY_SOURCES)}"
            )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a layer that the decoder does not have, or more tokens than there are."""
        check_layers_increase(self.name, [self.layer], geometry)
        site_budget(self.name, self.keep, self.keep_ratio, geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before layer K."""
        return (
            DecoderSite(
                cut=Cut(self.layer),
                reads=(
                    tensor_names.query(self.layer - 1),
                    tensor_names.present_key(self.layer - 1),
                    tensor_names.out(tensor_names.HIDDEN_STATES),
                ),
                host_inputs=(tensor_names.NUM_KEEP, tensor_names.VISUAL_PLACES),
                **site_budget(self.name, self.keep, self.keep_ratio, geometry)._asdict(),
            ),
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "AdaptPruneSelector":
        """The scoring and selecting module before layer K."""
        del site, geometry, weights
        return AdaptPruneSelector(self, decoder)


def nearness_table(max_distance: float, sigma: float) -> Tensor:
    """D_sp = exp(-d²/2σ²) by squared distance in patches, [W] float32; 0, the last entry, beyond ``max_distance``."""
    squared = torch.arange(math.floor(max_distance**2) + 1, dtype=torch.float64)
    return torch.cat((torch.exp(-squared / (2 * sigma**2)), torch.zeros(1))).to(torch.float32)


def centre_weights(places: Tensor) -> Tensor:
    """The Gaussian round the middle of a grid, largest value 1, [N] float32 (σ = half the grid).

    Shapes:
        places: [N, 5] int64: grid, row, column, rows and columns of the grid.
    """

    def exponent(index: Tensor, size: Tensor) -> Tensor:
        # In half steps from the middle, whole numbers: mirrored positions get the very same weight.
        half_steps = 2 * index - (size - 1)
        nearest = 1 - size % 2
        return (nearest - half_steps * half_steps).float() / (2 * (size - 1).clamp(min=1).square()).float()

    return torch.exp(exponent(places[:, 1], places[:, 3]) + exponent(places[:, 2], places[:, 4]))


class AdaptPruneSelector(SiteSelector):
    """Attention of the last row, lowered at the borders, and soft non-maximum suppression."""

    nearness: Tensor

    def __init__(self, method: AdaptPrune, decoder: LlamaDecoder) -> None:
        super().__init__()
        self.method = method
        layer = decoder.layer(method.layer)
        self.attention = layer.self_attn
        self.norm = layer.input_layernorm
        nearness = nearness_table(method.max_distance, method.distance_sigma)
        self.register_buffer("nearness", nearness, persistent=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep ``num_keep`` visual tokens."""
        visual_slots = inputs[tensor_names.VISUAL_SLOTS]
        layer = self.method.layer - 1
        attention = last_row_attention(
            inputs[tensor_names.query(layer)], inputs[tensor_names.present_key(layer)]
        )
        table = inputs[tensor_names.VISUAL_PLACES]
        places = table.index_select(0, visual_slots.clamp(min=0))
        keys = self._keys(inputs[tensor_names.out(tensor_names.HIDDEN_STATES)])[0]
        # Grids lie below each other, out of each other's reach.
        step = table[:, 3].amax(dim=0) + math.ceil(self.method.max_distance)
        row = places[:, 1] + places[:, 0] * step
        return select_by_soft_nms(
            (attention * centre_weights(places)).unsqueeze(0),
            inputs[tensor_names.NUM_KEEP],
            visual_slots >= 0,
            keys.float(),
            torch.stack((row, places[:, 2]), dim=1),
            self.nearness,
            similarity_sigma=self.method.similarity_sigma,
        )

    def _keys(self, hidden: Tensor) -> Tensor:
        """Keys before the rotary embedding: [1, S, C] → [1, S, Hkv·D]."""
        if self.method.key_source == "normed":
            return self.attention.merge_heads(self.attention.keys(self.norm(hidden)))
        keys: Tensor = self.attention.k_proj(hidden)
        return keys
