"""FastV: keep the visual tokens that the last prompt row attends to.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models" (ECCV 2024), and pkunlp-icler/FastV at d165972.
Before layer K, visual tokens are ranked by the attention of layer K-1, last row, mean over heads.

The paper's text averages the attention of all rows; the authors' code takes the last row, and so does this.
Unlike that code, every prompt of a batch is ranked by its own attention, and nothing is ranked again while decoding.
With several pictures, their tokens compete in one ranking.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from edgeprune import tensor_names
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.last_row import last_row_attention
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    SiteSelector,
    check_layers_increase,
)
from edgeprune.prune.token_budget import check_budget, site_budget


@dataclass(frozen=True)
class FastV(PruningMethod):
    """Parameters of FastV.

    Attributes:
        layer: K, the decoder layer before which tokens are dropped, 0-based.
        keep_ratio: Share of the visual tokens kept (1 - R of the paper).
        keep: Visual tokens kept per picture; 0 = by ``keep_ratio``.
    """

    layer: int = 2
    keep_ratio: float = 0.5
    keep: int = 0

    name: ClassVar[str] = "fastv"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"layer": 2, "keep_ratio": 0.5},
        "demo": {"layer": 3, "keep_ratio": 0.25},
    }

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a layer that the decoder does not have, or more tokens than there are."""
        check_layers_increase(self.name, [self.layer], geometry)
        site_budget(self.name, self.keep, self.keep_ratio, geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before layer K."""
        return (
            DecoderSite(
                cut=Cut(self.layer),
                reads=(tensor_names.query(self.layer - 1), tensor_names.present_key(self.layer - 1)),
                host_inputs=(tensor_names.NUM_KEEP,),
                **site_budget(self.name, self.keep, self.keep_ratio, geometry)._asdict(),
            ),
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "FastVSelector":
        """The ranking by the last row."""
        del site, geometry, weights, decoder
        return FastVSelector(self.layer)


class FastVSelector(SiteSelector):
    """Keeps the visual tokens with the highest attention of the last row."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep the ``num_keep`` visual tokens with the highest scores."""
        scores = last_row_attention(
            inputs[tensor_names.query(self.layer - 1)], inputs[tensor_names.present_key(self.layer - 1)]
        )
        visual = inputs[tensor_names.VISUAL_SLOTS] >= 0
        return select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual)
