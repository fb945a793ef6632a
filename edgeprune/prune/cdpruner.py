"""CDPruner: keep visual tokens that differ from each other, those near the prompt's text first.

As OpenVINO GenAI deploys it (openvinotoolkit/openvino.genai at da1db86, src/cpp/src/visual_language/cdpruner and
vision_token_pruning_processor.cpp), from the embedded prompt, before the decoder's first layer. Training-free.

The embeddings f_i of a picture's tokens and t, the mean embedding of all text tokens, have unit length (‖x‖² + 10⁻⁶
under the root). r_i = ±f_i·t, brought to 0 … 1 over the tokens that are pruned together; the kernel weighs the
similarities f_i·f_j by r_i and r_j; the tokens of a greedy MAP of the determinantal point process with that kernel are
kept (:func:`edgeprune.operators.token_select.select_by_dpp`).

Where that code has two ways, or leaves a choice:
  * Kernel. The model that it compiles computes (1 - w)·S_ij + w·r_i·S_ij·r_j; where that model fails, C++ code
    computes exp(α·r_i)·S_ij·exp(α·r_j) with α = w/(2(1 - w)) instead. ``weighting`` "blended" (the default, what
    runs) and "exponential". Both are S_ij at w = 0 and r_i·S_ij·r_j at w = 1.
  * Normalisation of r. The compiled model adds 10⁻⁶ to the range, the C++ code divides by 1 where the range is below
    10⁻⁶. Here it is the latter: the former spreads rounding errors of equal tokens over 0 … 1.
  * Halves. A picture's first and second half, in raster order, are pruned apart, ⌊K/2⌋ and ⌈K/2⌉ tokens, each with
    relevance of its own (``split_threshold`` is 1). It is there for speed; ``halves`` false prunes a picture whole.
  * Sign. ``negative_relevance`` is meant for CLIP towers and is false in that code, which nowhere sets it.
  * Several pictures are pruned each by itself (``enable_frame_chunking``), here too, and so are the tiles of one.
  * K = N·keep_ratio, halves rounded up, where the other methods of this package round down; where pictures differ in
    their number of tokens, this rounds down, too.
  * Gains of nothing. Where the kept tokens explain all others, that code goes on by rounding errors; here gains are
    compared in steps, and the rest goes by index.
  * Positions. For models with one position per token that code numbers the rows anew and decodes on from there:
    ``positions`` "upstream". The default keeps the original positions.
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
from edgeprune.operators.token_select import select_by_dpp, select_top_k
from edgeprune.prune.method import DecoderSite, ModelGeometry, PruningMethod, SiteSelector
from edgeprune.prune.per_grid import PER_GRID, rows_grids
from edgeprune.prune.token_budget import SiteBudget, check_budget, site_budget

WEIGHTINGS = ("blended", "exponential")
POSITIONS = {"original": ORIGINAL, "upstream": RENUMBERED}

_EPSILON = 1e-6
_OPENVINO = {
    "keep_ratio": 0.3,
    "relevance_weight": 0.5,
    "weighting": "blended",
    "halves": True,
    "positions": "upstream",
}


@dataclass(frozen=True)
class CdPruner(PruningMethod):
    """Parameters of CDPruner.

    Attributes:
        keep_ratio: Share of the visual tokens kept (1 - ``pruning_ratio``/100 of OpenVINO GenAI).
        keep: Visual tokens kept per picture; 0 = by ``keep_ratio``.
        relevance_weight: w, 0 (difference alone) to 1.
        weighting: How relevance enters the kernel: "blended" or "exponential".
        negative_relevance: Whether tokens unlike the text are the relevant ones.
        halves: Whether the two halves of a picture are pruned apart.
        positions: "original", or "upstream": rows renumbered behind the site.
    """

    keep_ratio: float = 0.3
    keep: int = 0
    relevance_weight: float = 0.5
    weighting: str = "blended"
    negative_relevance: bool = False
    halves: bool = True
    positions: str = "original"

    name: ClassVar[str] = "cdpruner"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "openvino": {**_OPENVINO, "negative_relevance": False},
        "openvino-clip": {**_OPENVINO, "negative_relevance": True},
    }

    def __post_init__(self) -> None:
        check_budget(self.name, self.keep, self.keep_ratio)
        if not 0 <= self.relevance_weight <= 1:
            raise PruningError(
                f"cdpruner: 'relevance_weight' is {self.relevance_weight}, allowed: 0 to 1 (0 = difference alone)"
            )
        if self.weighting not in WEIGHTINGS:
            raise PruningError(
                f"cdpruner: 'weighting' is '{self.weighting}', allowed: {', '.join(WEIGHTINGS)}"
            )
        if self.positions not in POSITIONS:
            raise PruningError(
                f"cdpruner: 'positions' is '{self.positions}', allowed: {', '.join(POSITIONS)}"
            )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse to keep more tokens than there are."""
        self._budget(geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before the first layer."""
        return (
            DecoderSite(
                cut=Cut(0),
                reads=(tensor_names.out(tensor_names.HIDDEN_STATES),),
                host_inputs=(tensor_names.NUM_KEEP, *PER_GRID),
                **self._budget(geometry)._asdict(),
                positions=POSITIONS[self.positions],
            ),
        )

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "CdPrunerSelector":
        """The kernel and the choice."""
        del site, geometry, weights, decoder
        return CdPrunerSelector(self)

    def _budget(self, geometry: ModelGeometry) -> SiteBudget:
        # Rounded before, too: 0.29 · 50 is 14.499999999999998.
        by_ratio = max(1, math.floor(round(geometry.num_patches * self.keep_ratio, 6) + 0.5))
        keep = self.keep or (by_ratio if geometry.one_size else 0)
        return site_budget(self.name, keep, self.keep_ratio, geometry)


def conditional_kernel(
    embeds: Tensor,
    visual: Tensor,
    groups: Tensor,
    *,
    relevance_weight: float,
    weighting: str,
    negative_relevance: bool,
) -> Tensor:
    """The similarities of the visual tokens, weighted by their relevance to the text, [S, S] float32.

    Entries of text rows and between groups mean nothing.

    Shapes:
        embeds: [S, C]; visual: [S] bool, the others are text; groups: [S] int64, from 0; relevance is normalised
        within a group.
    """
    rows = embeds.float()
    is_text = (~visual).float().unsqueeze(1)
    text = (rows * is_text).sum(dim=0) / is_text.sum().clamp(min=1.0)
    unit = _unit(rows)
    # Products and sums by row, not a matrix product: equal rows get equal bits in every runtime.
    relevance = (unit * _unit(text.unsqueeze(0))).sum(dim=1)
    if negative_relevance:
        relevance = -relevance
    same = (groups.unsqueeze(1) == groups.unsqueeze(0)) & visual.unsqueeze(0)
    lowest = torch.where(same, relevance, torch.inf).amin(dim=1)
    spread = torch.where(same, relevance, -torch.inf).amax(dim=1) - lowest
    relevance = (relevance - lowest) / torch.where(spread < _EPSILON, torch.ones_like(spread), spread)
    similarity = unit @ unit.transpose(0, 1)
    w = relevance_weight
    if w == 0:
        return similarity
    if weighting == "exponential" and w < 1:
        # Less the highest relevance, 1: the choice is the same, and no entry is far above 1.
        relevance = torch.exp(w / (2 * (1 - w)) * (relevance - 1))
    weighted = relevance.unsqueeze(1) * similarity * relevance.unsqueeze(0)
    return (1 - w) * similarity + w * weighted if weighting == "blended" else weighted


def _unit(rows: Tensor) -> Tensor:
    return rows / (rows.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt()


class CdPrunerSelector(SiteSelector):
    """Relevance to the text, difference from each other."""

    def __init__(self, method: CdPruner) -> None:
        super().__init__()
        self.method = method

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep ``num_keep`` visual tokens, as many of each grid as it is given."""
        num_keep, visual_slots = inputs[tensor_names.NUM_KEEP], inputs[tensor_names.VISUAL_SLOTS]
        visual = visual_slots >= 0
        groups, group_keep = self._groups(
            rows_grids(visual_slots, inputs[tensor_names.VISUAL_PLACES]),
            inputs[tensor_names.GRID_IDS],
            inputs[tensor_names.GRID_KEEP],
        )
        kernel = conditional_kernel(
            inputs[tensor_names.out(tensor_names.HIDDEN_STATES)][0],
            visual,
            groups,
            relevance_weight=self.method.relevance_weight,
            weighting=self.method.weighting,
            negative_relevance=self.method.negative_relevance,
        )
        order, count = select_by_dpp(kernel, num_keep, visual, groups, group_keep)
        # A grid that had lost more tokens than its number says would leave the sum short: others fill up by index.
        places = torch.arange(order.shape[0], device=order.device)
        kept = torch.zeros_like(order).scatter(0, order, (places < count).to(torch.int64))
        return select_top_k(kept.float().unsqueeze(0), num_keep, visual)

    def _groups(self, grid: Tensor, grid_ids: Tensor, grid_keep: Tensor) -> tuple[Tensor, Tensor]:
        """What a row is pruned together with, and how many of those are kept, [S] int64 each."""
        keep = grid_keep.index_select(0, grid.clamp(min=0))
        if not self.method.halves:
            return grid, keep
        member = (grid.unsqueeze(0) == grid_ids.unsqueeze(1)).long()
        before = (member * (member.cumsum(dim=1) - member)).sum(dim=0)
        size = (member * member.sum(dim=1, keepdim=True)).sum(dim=0)
        second = (before >= torch.div(size, 2, rounding_mode="floor")).long()
        first_keep = torch.div(keep, 2, rounding_mode="floor")
        return 2 * grid + second, first_keep + second * (keep - 2 * first_keep)
