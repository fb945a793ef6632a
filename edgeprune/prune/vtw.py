"""VTW: withdraw all visual tokens at a deep layer.

Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference" (AAAI 2025),
and lzhxmu/VTW at a3d8cfc. Before layer K every visual token is dropped; text keeps its original positions
(the authors' ``pe_type`` "keep"; their other form renumbers and is not offered).

The paper searches K on a few samples; its threshold is not in the code, so K is a parameter here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune import tensor_names
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    SiteSelector,
    check_layers_increase,
)


@dataclass(frozen=True)
class Vtw(PruningMethod):
    """Parameters of VTW.

    Attributes:
        layer: K, the decoder layer before which all visual tokens are dropped, 0-based.
    """

    layer: int = 15

    name: ClassVar[str] = "vtw"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"layer": 15},
        "dyrate-table": {"layer": 16},
    }

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a layer that the decoder does not have."""
        check_layers_increase(self.name, [self.layer], geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before layer K."""
        del geometry
        return (
            DecoderSite(
                cut=Cut(self.layer), reads=(), host_inputs=(tensor_names.NUM_KEEP,), keep_per_image=0
            ),
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "VtwSelector":
        """Drops what is visual."""
        del site, geometry, weights, decoder
        return VtwSelector()


class VtwSelector(SiteSelector):
    """Keeps the text."""

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep ``num_keep`` = 0 visual tokens."""
        visual_slots = inputs[tensor_names.VISUAL_SLOTS]
        scores = torch.zeros_like(visual_slots, dtype=torch.float32)
        return select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual_slots >= 0)
