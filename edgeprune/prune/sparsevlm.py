"""SparseVLM: text tokens that look at the picture rate it; the best of what is dropped is recycled.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (ICML 2025), and
Gumpest/SparseVLMs at 26a5f48, version 1. Training-free. After each of ``layers``, visual tokens are scored by that
layer's own attention from the raters, the text tokens whose share of the picture (softmax over the text of the inner
products of input embeddings, averaged over visual tokens) is above average. Of those that are dropped, the best 30 %
are clustered (DPC-kNN) and each cluster's mean goes on as one more visual token behind the kept ones.

Choices:
  * The numbers of kept tokens are the tables of the authors' code. Their first public version took the matrix rank of
    the scores (an SVD), which no graph can hold: ``rank_budget`` computes it, for comparison.
  * Upstream numbers all rows anew behind a site (``positions`` "upstream"); by default kept tokens keep their
    positions and a merged token has that of its cluster's centre.
  * Upstream adds noise of 1e-6 to the density so that no two are equal (two tokens that are each other's nearest
    often are); here the lower index counts as denser.
  * Where no text token is above the average (all alike), all of them rate.
  * Several pictures share one ranking and one clustering; merged tokens follow the last visual token.
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
from edgeprune.numbering import ORIGINAL, RENUMBERED
from edgeprune.operators.attention_score import attention_score
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.method import (
    DecoderSite,
    MergingSelector,
    ModelGeometry,
    PruningMethod,
    SiteSelector,
    check_layers_increase,
)

POSITIONS = {"original": ORIGINAL, "upstream": RENUMBERED}
RECYCLED_SHARE = 0.3
MERGED_SHARE = 10
"""One merged token for so many recycled ones."""


@dataclass(frozen=True)
class SparseVlm(PruningMethod):
    """Parameters of SparseVLM.

    Attributes:
        layers: Decoder layers behind which tokens are dropped, 0-based, increasing.
        keep: Visual tokens of a picture kept behind each of ``layers``, merged ones not counted.
        recycle: Whether dropped tokens are merged and go on.
        positions: "original", or "upstream": rows renumbered behind every site.
    """

    layers: tuple[int, ...] = (2, 6, 15)
    keep: tuple[int, ...] = (300, 200, 110)
    recycle: bool = True
    positions: str = "original"

    name: ClassVar[str] = "sparsevlm"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "192": {"keep": (300, 200, 110)},
        "128": {"keep": (303, 110, 36)},
        "96": {"keep": (238, 48, 26)},
        "64": {"keep": (66, 30, 17)},
    }

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.keep):
            raise PruningError(
                f"sparsevlm: {len(self.layers)} 'layers' and {len(self.keep)} 'keep': give one count for each "
                "layer, at least one"
            )
        if any(count < 1 for count in self.keep):
            raise PruningError(f"sparsevlm: 'keep' is {list(self.keep)}, allowed: 1 or more each")
        if self.positions not in POSITIONS:
            raise PruningError(
                f"sparsevlm: 'positions' is '{self.positions}', allowed: {', '.join(POSITIONS)}"
            )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse layers that the decoder does not have, and counts that are not below what there is."""
        if not geometry.one_size:
            raise PruningError(
                "sparsevlm: its tables count the tokens of pictures of one size, and this family's differ; "
                "use pyramiddrop or fastv"
            )
        check_layers_increase(self.name, self.layers, geometry, behind=True)
        self._counts(geometry.num_patches)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """One site behind each of ``layers``."""
        return tuple(
            DecoderSite(
                cut=Cut(layer + 1),
                reads=(
                    tensor_names.query(layer),
                    tensor_names.present_key(layer),
                    tensor_names.out(tensor_names.HIDDEN_STATES),
                    tensor_names.POSITION_IDS,
                    tensor_names.INPUTS_EMBEDS,
                    tensor_names.PROMPT_SLOTS,
                ),
                host_inputs=(
                    tensor_names.TEXT_ROWS,
                    tensor_names.PROMPT_TEXT_ROWS,
                    tensor_names.NUM_KEEP,
                    *((tensor_names.RECYCLED_IDS, tensor_names.MERGED_IDS) if self.recycle else ()),
                ),
                keep_per_image=keep + merged,
                positions=POSITIONS[self.positions],
                recycled_per_image=recycled,
                merged_per_image=merged,
            )
            for layer, (keep, recycled, merged) in zip(
                self.layers, self._counts(geometry.num_patches), strict=True
            )
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> SiteSelector:
        """The rating, selection and recycling behind ``layers[site]``."""
        del geometry, weights, decoder
        layer = self.layers[site]
        return SparseVlmRecycler(layer) if self.recycle else SparseVlmSelector(layer)

    def _counts(self, num_patches: int) -> list[tuple[int, int, int]]:
        """Kept, recycled and merged tokens behind every site."""
        counts, entering = [], num_patches
        for keep in self.keep:
            if keep >= entering:
                raise PruningError(
                    f"sparsevlm: 'keep' {list(self.keep)} does not fit a picture of {num_patches} visual tokens: "
                    f"{keep} of {entering} would drop nothing; give smaller counts"
                )
            recycled, merged = recycling(entering - keep) if self.recycle else (0, 0)
            counts.append((keep, recycled, merged))
            entering = keep + merged
        return counts


def recycling(dropped: int) -> tuple[int, int]:
    """How many of ``dropped`` tokens are recycled, and into how many they are merged."""
    recycled = min(dropped, int(RECYCLED_SHARE * dropped) + 1)
    return recycled, min(recycled, recycled // MERGED_SHARE + 1)


def rater_weights(embeds: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """Weights of the text tokens as raters: equal for all that are one, zero for the others, sum 1.

    Shapes:
        embeds: [S, C], input embeddings; visual: [S] bool, the visual rows; text: [T, C], the text's.
        returns: [T] float32
    """
    rows = visual.float()
    share = (rows @ (embeds @ text.T).softmax(dim=1)) / rows.sum()
    rater = share > share.mean()
    weights = (rater | ~rater.any()).float()
    return weights / weights.sum()


def rank_budget(attention: Tensor, num_visual: int, scale: float = 13.5, bias: float = 0.0) -> int:
    """Tokens to keep by the rank of the raters' attention (the authors' first public version, 91fb6d9).

    Shapes:
        attention: [raters, V] float32, heads averaged.
    """
    return max(1, min(int(int(torch.linalg.matrix_rank(attention)) * scale + bias), num_visual - 1))


def cluster_and_merge(tokens: Tensor, merged_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens into as many means as ``merged_ids`` has entries (DPC-kNN).

    A token's density is exp(-mean squared distance to its k nearest, itself included), k the number of clusters; its
    distance is that to the nearest token of higher density (the greatest of all where there is none). Centres have the
    highest product of both; the others join the nearest centre.

    Shapes:
        tokens: [P, C]; merged_ids: [R] int64, 0 … R-1, R ≤ P.
        returns: the means [R, C] float32, and the centres [R] int64, rows of ``tokens``.
    """
    values = tokens.float()
    square = values.square().sum(dim=1)
    squared = square[:, None] + square[None, :] - 2 * (values @ values.T)
    count = tokens.shape[0]
    own = torch.arange(count, device=tokens.device)
    # Rounding may leave a token at a distance from itself.
    squared = torch.where(own[:, None] == own[None, :], 0.0, squared.clamp(min=0)) / tokens.shape[1]
    # Bitwise symmetric, so that tokens that are each other's nearest tie in every runtime.
    distance = ((squared + squared.T) / 2).sqrt()
    nearest = torch.sort(distance, dim=1, stable=True).values.index_select(1, merged_ids)
    density = torch.exp(-nearest.square().mean(dim=1))
    equal = density[None, :] == density[:, None]
    denser = (density[None, :] > density[:, None]) | (equal & (own[None, :] < own[:, None]))
    reach = torch.where(denser, distance, distance.max()).amin(dim=1)
    order = torch.sort(reach * density, descending=True, stable=True).indices
    centres = order.index_select(0, merged_ids)
    to_centre = distance.index_select(0, centres)
    cluster = to_centre.argmin(dim=0)
    is_own = centres[:, None] == own[None, :]
    joins = ~is_own.any(dim=0)[None, :] & (merged_ids[:, None] == cluster[None, :])
    belongs = (is_own | joins).float()
    return (belongs @ values) / belongs.sum(dim=1, keepdim=True).clamp(min=1), centres


def rater_scores(inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    """The raters' attention to every row in a layer, heads averaged, [S] float32."""
    query = inputs[tensor_names.query(layer)]
    embeds = inputs[tensor_names.INPUTS_EMBEDS][0].float()
    text = embeds.index_select(0, inputs[tensor_names.PROMPT_TEXT_ROWS])
    raters = rater_weights(embeds, inputs[tensor_names.PROMPT_SLOTS] >= 0, text)
    text_rows = inputs[tensor_names.TEXT_ROWS]
    return attention_score(
        query.index_select(2, text_rows),
        inputs[tensor_names.present_key(layer)],
        text_rows,
        raters.unsqueeze(0),
        scale=1 / math.sqrt(query.shape[-1]),
    )[0, 0]


class SparseVlmSelector(SiteSelector):
    """Keeps what the raters attend to."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep the ``num_keep`` visual tokens with the highest scores."""
        scores = rater_scores(inputs, self.layer)
        visual = inputs[tensor_names.VISUAL_SLOTS] >= 0
        return select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual)


class SparseVlmRecycler(MergingSelector):
    """Keeps what the raters attend to, and merges some of the rest."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keep ``num_keep`` visual tokens and the merged ones."""
        slots = inputs[tensor_names.VISUAL_SLOTS]
        hidden = inputs[tensor_names.out(tensor_names.HIDDEN_STATES)]
        positions = inputs[tensor_names.POSITION_IDS]
        merged_ids = inputs[tensor_names.MERGED_IDS]
        scores = rater_scores(inputs, self.layer)
        order, count = select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], slots >= 0)
        rows = torch.arange(slots.shape[0], device=slots.device)
        kept = torch.zeros_like(slots).scatter(0, order, (rows < count).to(torch.int64)) > 0

        # Dropped rows first, the best of them foremost.
        ranked = torch.sort(torch.where(kept, -torch.inf, scores), descending=True, stable=True).indices
        recycled = ranked.index_select(0, inputs[tensor_names.RECYCLED_IDS])
        merged, centres = cluster_and_merge(hidden[0].index_select(0, recycled), merged_ids)
        sources = recycled.index_select(0, centres)

        # Every row has a place in the sequence; merged rows stand between the last visual token and the text.
        first_text = inputs[tensor_names.TEXT_ROWS][:1]
        behind = 4 * slots.shape[0]
        place = torch.cat(
            (
                torch.where(kept, 2 * rows, 2 * rows + behind),
                (2 * first_text - 1).expand(merged_ids.shape[0]),
            )
        )
        keep_indices = torch.sort(place, stable=True).indices
        new = merged.to(hidden.dtype).unsqueeze(0)
        extended = {
            tensor_names.HIDDEN_STATES: torch.cat((hidden, new), dim=1),
            tensor_names.POSITION_IDS: torch.cat((positions, positions.index_select(1, sources)), dim=1),
            tensor_names.VISUAL_SLOTS: torch.cat((slots, slots.index_select(0, sources))),
        }
        named = {tensor_names.extended(name): tensor for name, tensor in extended.items()}
        return keep_indices, count + merged_ids.shape[0], named
