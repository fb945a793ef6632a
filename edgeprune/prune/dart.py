"""DART: keep a few pivots and the visual tokens least like them; what repeats others goes.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (2025), and
TensorRT Edge-LLM, which deploys it on the embedded prompt (``--visualPruneAlgo dart``; cpp/runtime/preprocess/
dartPruner.cpp and visualTokenPruner.cpp, read in nvluxiaoz/TensorRT-Edge-LLM at 2add2e2). Training-free.

The pivots of a picture are its ``image_pivots`` tokens and the prompt's ``text_pivots`` text tokens with the highest
L1 norm. Image pivots are kept. Then each pivot in turn, the picture's first, by falling norm, adds the tokens with the
lowest cosine to it among those not yet kept: ⌈what is missing / pivots left⌉ of them.

Two forms, by ``layer``:
  * 0, Edge-LLM's: before the first layer. Norms and cosines are those of the embeddings; all text tokens may be pivots.
  * K ≥ 1, the paper's: before layer K. Norms are those of the keys of layer K-1, all heads together; cosines are those
    of the hidden states after the decoder's last norm (the authors' ``get_retained_image_token``, read in
    xqy1111111/DART, a copy of ZichenWen1/DART, at 0247657); text behind the last picture alone may be pivots. The keys
    here are the cached ones, after the rotary embedding.

Choices, the same for both forms and Edge-LLM's where the two differ:
  * The budget is met exactly. The authors' code adds ⌊K/pivots⌋ tokens for each pivot, whatever is missing, besides
    the image pivots, and takes the pivots in the order of a Python set.
  * Several pictures, and tiles of one: each has image pivots and a budget of its own and shares the text pivots.
  * K = ⌈N·keep_ratio⌉, where the other methods of this package round down; where pictures differ in their number of
    tokens, this rounds down, too.
  * Cosines are compared in steps of 2⁻¹⁶, so that tokens that are alike in everything tie in every runtime; ties go to
    the lower index. Positions stay.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.token_select import select_top_k, unit_rows
from edgeprune.prune.method import DecoderSite, ModelGeometry, PruningMethod, SiteSelector
from edgeprune.prune.per_grid import PER_GRID, rows_grids
from edgeprune.prune.token_budget import SiteBudget, check_budget, site_budget

COSINE_STEPS = 2.0**16
"""Cosines are compared in steps of one over this."""


@dataclass(frozen=True)
class Dart(PruningMethod):
    """Parameters of DART.

    Attributes:
        layer: K, the decoder layer before which tokens are dropped, 0-based; 0 = on the embedded prompt.
        keep_ratio: Share of the visual tokens kept (1 - ``dartReductionRatio`` of TensorRT Edge-LLM).
        keep: Visual tokens kept per picture; 0 = by ``keep_ratio``.
        image_pivots: Pivots among a picture's tokens.
        text_pivots: Pivots among the text tokens.
    """

    layer: int = 0
    keep_ratio: float = 0.75
    keep: int = 0
    image_pivots: int = 4
    text_pivots: int = 4

    name: ClassVar[str] = "dart"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "edge-llm": {"layer": 0, "keep_ratio": 0.75},
        "paper": {"layer": 2, "keep_ratio": 0.222},
    }

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        for parameter in ("image_pivots", "text_pivots"):
            if getattr(self, parameter) < 0:
                raise PruningError(f"dart: '{parameter}' is {getattr(self, parameter)}, allowed: 0 or more")
        if self.image_pivots + self.text_pivots == 0:
            raise PruningError("dart: 'image_pivots' and 'text_pivots' are both 0: give at least one pivot")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a layer that the decoder does not have, or more tokens than there are."""
        if not 0 <= self.layer < geometry.num_layers:
            raise PruningError(
                f"dart: 'layer' is {self.layer}, allowed: 0 … {geometry.num_layers - 1} (0 = on the embedded prompt)"
            )
        self._budget(geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before layer K."""
        hidden = tensor_names.out(tensor_names.HIDDEN_STATES)
        host_inputs = (tensor_names.NUM_KEEP, *PER_GRID)
        keys = (tensor_names.present_key(self.layer - 1),) if self.layer else ()
        return (
            DecoderSite(
                cut=Cut(self.layer),
                reads=(hidden, *keys),
                host_inputs=(*host_inputs, tensor_names.TEXT_ROWS) if self.layer else host_inputs,
                **self._budget(geometry)._asdict(),
            ),
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "DartSelector":
        """Pivots and what is least like them."""
        del site, geometry, weights
        return DartSelector(self, decoder)

    def _budget(self, geometry: ModelGeometry) -> SiteBudget:
        # Rounded before: 0.07 · 100 is 7.000000000000001.
        by_ratio = math.ceil(round(geometry.num_patches * self.keep_ratio, 6))
        keep = self.keep or (by_ratio if geometry.one_size else 0)
        return site_budget(self.name, keep, self.keep_ratio, geometry)


def keep_unlike_pivots(
    norms: Tensor,
    features: Tensor,
    member: Tensor,
    text: Tensor,
    num_keep: Tensor,
    *,
    image_pivots: int,
    text_pivots: int,
) -> Tensor:
    """The tokens of each picture that are pivots or unlike them, [S] bool.

    Shapes:
        norms: [S] float32, by which pivots are chosen
        features: [S, F], by which tokens are alike
        member: [M, S] bool, the tokens of each picture
        text: [S] bool, the rows that may be text pivots
        num_keep: [M, 1] int64, tokens kept of each picture
    """
    direction = unit_rows(features)
    picture = member.long().argmax(dim=0)
    image_rank = _rank(torch.where(member, norms, -torch.inf))
    text_rank = _rank(torch.where(text, norms, -torch.inf).unsqueeze(0))
    num_text = text.sum().clamp(max=text_pivots)
    kept = member & (image_rank < num_keep.clamp(max=image_pivots))
    for pivot in range(image_pivots + text_pivots):
        # At most one 1 in a row: the product is a gather that may find nothing.
        if pivot < image_pivots:
            is_pivot = member & (image_rank == pivot)
            pivots = (is_pivot.float() @ direction)[picture]
        else:
            is_pivot = text & (text_rank == pivot - image_pivots)
            pivots = is_pivot.float() @ direction
        # Products and sums by row, not a matrix product: equal rows get equal bits in every runtime.
        unlike = -((pivots * direction).sum(dim=1) * COSINE_STEPS).round()
        candidate = member & ~kept
        missing = num_keep - kept.sum(dim=1, keepdim=True)
        pivots_left = (num_text + (image_pivots - pivot)).clamp(min=1)
        share = torch.div(missing + pivots_left - 1, pivots_left, rounding_mode="floor")
        rank = _rank(torch.where(candidate, unlike, -torch.inf))
        kept = kept | (candidate & (rank < share) & is_pivot.any(dim=1, keepdim=True))
    return kept.any(dim=0)


def _rank(scores: Tensor) -> Tensor:
    """Rank within a row of [M, S], 0 the highest; ties to the lower index."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order.sort(dim=1, stable=True).indices


class DartSelector(SiteSelector):
    """Norms and features of the form that ``layer`` asks for, and the choice."""

    def __init__(self, method: Dart, decoder: LlamaDecoder) -> None:
        super().__init__()
        self.method = method
        self.norm: nn.Module = decoder.norm if method.layer else nn.Identity()

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep ``num_keep`` visual tokens, as many of each grid as it is given."""
        num_keep, visual_slots = inputs[tensor_names.NUM_KEEP], inputs[tensor_names.VISUAL_SLOTS]
        grid = rows_grids(visual_slots, inputs[tensor_names.VISUAL_PLACES])
        visual = visual_slots >= 0
        hidden = inputs[tensor_names.out(tensor_names.HIDDEN_STATES)]
        features = self.norm(hidden)[0].float()
        if self.method.layer:
            key = inputs[tensor_names.present_key(self.method.layer - 1)].float()
            norms = key[0].transpose(0, 1).flatten(1).abs().sum(dim=1)
            first_text = inputs[tensor_names.TEXT_ROWS][:1]
            text = torch.arange(visual.shape[0], device=visual.device) >= first_text
        else:
            norms, text = features.abs().sum(dim=1), ~visual
        kept = keep_unlike_pivots(
            norms,
            features,
            grid.unsqueeze(0) == inputs[tensor_names.GRID_IDS].unsqueeze(1),
            text,
            inputs[tensor_names.GRID_KEEP].unsqueeze(1),
            image_pivots=self.method.image_pivots,
            text_pivots=self.method.text_pivots,
        )
        return select_top_k(kept.float().unsqueeze(0), num_keep, visual)
