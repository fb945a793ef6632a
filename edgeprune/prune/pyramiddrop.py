"""PyramidDrop: fewer visual tokens with every stage of the decoder.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
(CVPR 2025), and Cooperx521/PyramidDrop at 6444f30. Before each of ``layers``, visual tokens are ranked by the attention
that layer itself would pay them from the prompt's last row: its norm, query and key projections and rotary embedding
run on the hidden states that enter it, softmax over the whole row, mean over heads. Training-free.

Upstream numbers the rows anew behind every site but goes on decoding from the original length; the default here keeps
the original positions, ``positions`` "upstream" does as upstream does. With several pictures, their tokens compete in
one ranking.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder, apply_rotary, rotary_angles
from edgeprune.numbering import ORIGINAL, RENUMBERED_PREFILL
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

POSITIONS = {"original": ORIGINAL, "upstream": RENUMBERED_PREFILL}


@dataclass(frozen=True)
class PyramidDrop(PruningMethod):
    """Parameters of PyramidDrop.

    Attributes:
        layers: Decoder layers before which tokens are dropped, 0-based, increasing.
        keep_ratios: Share of a picture's tokens that is left behind each of ``layers``, not rising.
        positions: "original", or "upstream": rows renumbered behind every site in prefill.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep_ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: str = "original"

    name: ClassVar[str] = "pyramiddrop"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"layers": (8, 16, 24), "keep_ratios": (0.5, 0.25, 0.125)}
    }

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.keep_ratios):
            raise PruningError(
                f"pyramiddrop: {len(self.layers)} 'layers' and {len(self.keep_ratios)} 'keep_ratios': "
                "give one ratio for each layer, at least one"
            )
        for ratio in self.keep_ratios:
            check_budget(self.name, 0, ratio)
        if list(self.keep_ratios) != sorted(self.keep_ratios, reverse=True):
            raise PruningError(
                f"pyramiddrop: 'keep_ratios' {list(self.keep_ratios)} rise: shares are of the unpruned picture"
            )
        if self.positions not in POSITIONS:
            raise PruningError(
                f"pyramiddrop: 'positions' is '{self.positions}', allowed: {', '.join(POSITIONS)}"
            )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse layers that the decoder does not have."""
        check_layers_increase(self.name, self.layers, geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """One site before each of ``layers``."""
        return tuple(
            DecoderSite(
                cut=Cut(layer),
                reads=(tensor_names.out(tensor_names.HIDDEN_STATES), tensor_names.POSITION_IDS),
                host_inputs=(tensor_names.NUM_KEEP,),
                **site_budget(self.name, 0, ratio, geometry)._asdict(),
                positions=POSITIONS[self.positions],
            )
            for layer, ratio in zip(self.layers, self.keep_ratios, strict=True)
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "PyramidDropSelector":
        """The ranking by the next layer."""
        del geometry, weights
        return PyramidDropSelector(self.layers[site], decoder)


class PyramidDropSelector(SiteSelector):
    """Keeps what the next layer's last row would attend to."""

    def __init__(self, layer: int, decoder: LlamaDecoder) -> None:
        super().__init__()
        self.config = decoder.config
        self.norm = decoder.layer(layer).input_layernorm
        self.attention = decoder.layer(layer).self_attn

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep the ``num_keep`` visual tokens with the highest scores."""
        normed = self.norm(inputs[tensor_names.out(tensor_names.HIDDEN_STATES)])
        position_ids = inputs[tensor_names.POSITION_IDS]
        angles = rotary_angles(self.config, position_ids, normed.dtype)
        last_angles = rotary_angles(self.config, position_ids[:, -1:], normed.dtype)
        query = apply_rotary(self.attention.queries(normed[:, -1:]), last_angles)
        key = apply_rotary(self.attention.keys(normed), angles)
        scores = last_row_attention(query, key)
        visual = inputs[tensor_names.VISUAL_SLOTS] >= 0
        return select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual)
