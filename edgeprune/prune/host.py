"""Host: the device scores, the choice may be the host's.

No published method: a place where a program decides. Before each of ``layers``, visual tokens are scored by the
attention of the layer before it, and the bundle's graph gives these scores beside a choice of its own: the highest, as
FastV. A pruner that a session is opened with (:mod:`edgeprune.runtimes.host_pruner`, ``edgeprune_pruner`` of the C
library) makes the choice instead, by whatever the program knows: time that is left, a region of interest, an earlier
frame. Without one the bundle runs by its own choice, so it exports, verifies, calibrates and profiles like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.attention_score import attention_score
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.last_row import last_row_attention
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    ScoringSelector,
    check_layers_increase,
)
from edgeprune.prune.token_budget import check_budget, site_budget

LAST_ROW, TEXT_ROWS = "last-row", "text-rows"
SCORES = (LAST_ROW, TEXT_ROWS)


@dataclass(frozen=True)
class Host(PruningMethod):
    """Parameters of the host's choice.

    Attributes:
        layers: Decoder layers before which tokens are dropped, 0-based, increasing.
        keep_ratio: Share that the bundle's own choice leaves of the tokens before each of ``layers``: of a picture's
            unpruned tokens ``keep_ratio`` behind the first, its square behind the second, and so on.
        score: "last-row", the attention of the prompt's last row (FastV's score), or "text-rows", the mean over the
            rows after the last picture.
    """

    layers: tuple[int, ...] = (2,)
    keep_ratio: float = 0.5
    score: str = LAST_ROW

    name: ClassVar[str] = "host"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"half": {"layers": (2,), "keep_ratio": 0.5}}

    def __post_init__(self) -> None:
        if not self.layers:
            raise PruningError("host: 'layers' is empty: give at least one layer")
        check_budget(self.name, 0, self.keep_ratio)
        if self.score not in SCORES:
            raise PruningError(f"host: 'score' is '{self.score}', allowed: {', '.join(SCORES)}")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse layers that the decoder does not have."""
        check_layers_increase(self.name, self.layers, geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """One site before each of ``layers``."""
        text_rows = (tensor_names.TEXT_ROWS,) if self.score == TEXT_ROWS else ()
        return tuple(
            DecoderSite(
                cut=Cut(layer),
                reads=(tensor_names.query(layer - 1), tensor_names.present_key(layer - 1)),
                host_inputs=(*text_rows, tensor_names.NUM_KEEP),
                **site_budget(self.name, 0, self.keep_ratio**order, geometry)._asdict(),
            )
            for order, layer in enumerate(self.layers, start=1)
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "HostSelector":
        """The scores, and the choice of the highest."""
        del weights, decoder
        return HostSelector(self.layers[site], self.score, geometry.head_dim**-0.5)


class HostSelector(ScoringSelector):
    """Gives the attention that visual tokens receive; keeps the highest unless the host chooses."""

    def __init__(self, layer: int, score: str, scale: float) -> None:
        super().__init__()
        self.layer, self.score, self.scale = layer, score, scale

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Score, and keep the ``num_keep`` visual tokens with the highest scores."""
        query = inputs[tensor_names.query(self.layer - 1)]
        key = inputs[tensor_names.present_key(self.layer - 1)]
        if self.score == LAST_ROW:
            scores = last_row_attention(query, key)
        else:
            rows = inputs[tensor_names.TEXT_ROWS]
            weight = torch.ones_like(rows, dtype=torch.float32) / rows.shape[0]
            asking = query.index_select(2, rows)
            scores = attention_score(asking, key, rows, weight.unsqueeze(0), scale=self.scale)[0, 0]
        visual = inputs[tensor_names.VISUAL_SLOTS] >= 0
        kept = select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual)
        return *kept, {tensor_names.SCORES: scores}
