"""ATP-LLaVA: adaptive token pruning with learned thresholds.

Ye et al., "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models" (CVPR 2025), §3.3.
Before layer i, visual tokens are scored by the attention of layer i-1 and kept if either score passes its threshold:
the redundant score S_red = (S_self + S_cross)/2 > θ_r, or the spatial score S_spatial > θ_s. The thresholds are
predicted from the scores, per grid of tokens and site, so the number of kept tokens depends on the input.

No code of the authors is public. Where the paper is silent:
  * S_self(n) is the column mean of the logits over the visual queries of the same grid (Eq. 3 with the argument
    order of Eq. 4), computed as mean(q)·k_n/√d, which is the same number.
  * Scores are averaged over heads. θ is a property of a grid: a picture, or a tile where a family cuts pictures into
    tiles. Where grids differ in size, scores are averaged into the cells of the grid that the heads were made for.
  * Eq. 3 averages unbounded logits with probabilities of about 1/L and compares them with θ in (0, 1).
    ``self_norm`` and ``cross_norm`` say what is done about it; "none" is the equation as written.
  * The grids of the spatial score are nested strides (2, 4, 8); a token takes the highest score of the grids that
    contain it, so a lower θ_s selects a denser grid (Eq. 5).
  * A pruned token's scores enter the threshold heads as zeros.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.operators.attention_score import attention_score
from edgeprune.operators.token_select import select_by_threshold
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    SiteSelector,
    check_layers_increase,
)

SCORE_NORMS = ("none", "sigmoid", "minmax")


@dataclass(frozen=True)
class Atp(PruningMethod):
    """Parameters of ATP.

    Attributes:
        layers: Decoder layers before which tokens are dropped, 0-based; each reads the attention of the layer before.
        sample_scale: λ_sample of Eq. 5.
        strides: Strides of the nested grids of the spatial score.
        hidden_width: Width of the shared projection of the threshold heads.
        self_norm: What is done to S_self before it is averaged: "none", "sigmoid", or "minmax" over the picture's
            tokens.
        cross_norm: The same for S_cross.
        self_weight: Weight of S_self in S_red, 0 to 1; S_cross has the rest. The paper's mean is 0.5; less where
            S_self ranks the tokens worse than S_cross does.
    """

    layers: tuple[int, ...] = (4, 14, 24)
    sample_scale: float = 3.0
    strides: tuple[int, ...] = (2, 4, 8)
    hidden_width: int = 256
    self_norm: str = "none"
    cross_norm: str = "none"
    self_weight: float = 0.5

    name: ClassVar[str] = "atp"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-144": {"layers": (4, 14, 24)},
        "paper-88": {"layers": (1, 13, 25)},
    }

    def __post_init__(self) -> None:
        if not self.layers:
            raise PruningError("atp: 'layers' is empty: name at least one decoder layer")
        if not self.strides or any(stride < 1 for stride in self.strides):
            raise PruningError(
                f"atp: 'strides' is {list(self.strides)}: give at least one stride of 1 or more"
            )
        if self.hidden_width < 1 or not 0 < self.sample_scale < math.inf:
            raise PruningError("atp: 'hidden_width' must be at least 1 and 'sample_scale' positive")
        if not 0 <= self.self_weight <= 1:
            raise PruningError(f"atp: 'self_weight' is {self.self_weight}, allowed: 0 to 1")
        for option in ("self_norm", "cross_norm"):
            if getattr(self, option) not in SCORE_NORMS:
                raise PruningError(
                    f"atp: '{option}' is '{getattr(self, option)}', allowed: {', '.join(SCORE_NORMS)}"
                )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse layers that the decoder does not have."""
        check_layers_increase(self.name, self.layers, geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """One site before each of ``layers``."""
        del geometry
        return tuple(
            DecoderSite(
                cut=Cut(layer),
                reads=(tensor_names.query(layer - 1), tensor_names.present_key(layer - 1)),
                host_inputs=(tensor_names.TEXT_ROWS, tensor_names.GRID_IDS, tensor_names.VISUAL_PLACES),
                keep_per_image=None,
            )
            for layer in self.layers
        )

    def weight_shapes(self, geometry: ModelGeometry) -> Mapping[str, tuple[int, ...]]:
        """The threshold heads of every site."""
        width, features = self.hidden_width, 2 * geometry.num_patches
        shapes: dict[str, tuple[int, ...]] = {}
        for site in range(len(self.layers)):
            shapes |= {
                f"site{site}.proj.weight": (width, features),
                f"site{site}.proj.bias": (width,),
                f"site{site}.head_r.weight": (1, width),
                f"site{site}.head_r.bias": (1,),
                f"site{site}.head_s.weight": (1, width),
                f"site{site}.head_s.bias": (1,),
            }
        return shapes

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "AtpSelector":
        """The scoring and selecting module before ``layers[site]``."""
        del decoder
        selector = AtpSelector(self, self.layers[site], geometry)
        prefix = f"site{site}."
        selector.heads.load_state_dict(
            {
                name.removeprefix(prefix): tensor.float()
                for name, tensor in weights.items()
                if name.startswith(prefix)
            }
        )
        return selector


class ThresholdHeads(nn.Module):
    """The thresholds θ_r and θ_s from the scores (Eq. 6-8)."""

    def __init__(self, num_patches: int, width: int, *, theta_r: float = 0.02, theta_s: float = 0.5) -> None:
        """Start with zero head weights, so that training begins from the given thresholds."""
        super().__init__()
        self.proj = nn.Linear(2 * num_patches, width)
        self.head_r = nn.Linear(width, 1)
        self.head_s = nn.Linear(width, 1)
        for head, theta in ((self.head_r, theta_r), (self.head_s, theta_s)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, math.log(theta / (1 - theta)))

    def forward(self, self_scores: Tensor, cross_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the thresholds of each picture.

        Shapes:
            self_scores, cross_scores: [M, N0] float32 by grid position, zeros where a token is pruned.
            returns: θ_r [M], θ_s [M], in (0, 1).
        """
        z = self.proj(torch.cat((self_scores, cross_scores), dim=-1))
        return torch.sigmoid(self.head_r(z)).squeeze(-1), torch.sigmoid(self.head_s(z)).squeeze(-1)


class AtpScores(NamedTuple):
    """The scores of one site, by sequence row; rows of text hold zeros.

    Shapes:
        self_score, cross_score, spatial_score: [S] float32.
    """

    self_score: Tensor
    cross_score: Tensor
    spatial_score: Tensor
    self_weight: float = 0.5

    @property
    def redundant_score(self) -> Tensor:
        """S_red, [S]."""
        return self.self_weight * self.self_score + (1 - self.self_weight) * self.cross_score


def spatial_scores(places: Tensor, strides: tuple[int, ...], sample_scale: float) -> Tensor:
    """The fixed spatial score of grid positions (Eq. 5), [N] float32; 0 where no stride samples it.

    Each stride samples every stride-th row and column; its rate R is the share of the grid that it samples.

    Shapes:
        places: [N, 5] int64: grid, row, column, rows and columns of the grid.
    """
    row, column, rows, columns = places[:, 1:].unbind(dim=1)
    scores = torch.zeros_like(row, dtype=torch.float32)
    for stride in strides:
        sampled = ((rows + stride - 1) // stride) * ((columns + stride - 1) // stride)
        score = 1.0 - sample_scale * sampled.float() / (rows * columns).clamp(min=1).float()
        on_grid = (row % stride == 0) & (column % stride == 0)
        scores = torch.where(on_grid, torch.maximum(scores, score), scores)
    return scores


def grid_places(grid: tuple[int, int]) -> Tensor:
    """The places of one grid's positions, row by row, [N0, 5] int64."""
    rows, columns = grid
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    size = torch.tensor(grid).expand(rows * columns, 2)
    return torch.cat((torch.zeros(rows * columns, 1, dtype=torch.int64), positions, size), dim=1)


def normalise_scores(scores: Tensor, members: Tensor, norm: str) -> Tensor:
    """Bring scores to a common scale within each picture.

    Shapes:
        scores: [S] float32; members: [M, S] bool, the visual rows of each picture; returns [S], 0 outside.
    """
    if norm == "sigmoid":
        scores = torch.sigmoid(scores)
    elif norm == "minmax":
        low = torch.where(members, scores, math.inf).amin(dim=1, keepdim=True)
        high = torch.where(members, scores, -math.inf).amax(dim=1, keepdim=True)
        # One member, or all equal: every score is 0.
        scaled = (scores - low) / (high - low).clamp(min=1e-6)
        return torch.where(members, scaled, 0.0).sum(dim=0)
    return torch.where(members.any(dim=0), scores, 0.0)


class AtpSelector(SiteSelector):
    """Scores, thresholds and selection before one decoder layer."""

    def __init__(self, method: Atp, layer: int, geometry: ModelGeometry) -> None:
        super().__init__()
        self.method = method
        self.layer = layer
        self.grid = geometry.grid
        self.one_grid = geometry.one_grid
        self.scale = 1 / math.sqrt(geometry.head_dim)
        self.heads = ThresholdHeads(geometry.num_patches, method.hidden_width)

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        visual_slots: Tensor,
        text_rows: Tensor,
        grid_ids: Tensor,
        places: Tensor,
    ) -> AtpScores:
        """Score the rows of one sequence.

        Shapes:
            query: [1, H, S, D]; key: [1, Hkv, S, D]; visual_slots: [S]; text_rows: [T]; grid_ids: [G];
            places: [P, 5] by slot.
        """
        place = places.index_select(0, visual_slots.clamp(min=0))
        members = (place[:, 0].unsqueeze(0) == grid_ids.unsqueeze(1)) & (visual_slots >= 0)
        counts = members.sum(dim=1, keepdim=True).clamp(min=1)
        mean_rows = members.float() / counts
        all_rows = torch.arange(query.shape[2], device=query.device)
        per_grid = attention_score(
            query, key, all_rows, mean_rows, scale=self.scale, mode="logits", causal=False
        )
        self_score = torch.where(members, per_grid[0], 0.0).sum(dim=0)
        text_weight = torch.ones_like(text_rows, dtype=torch.float32) / text_rows.shape[0]
        cross_score = attention_score(
            query.index_select(2, text_rows),
            key,
            text_rows,
            text_weight.unsqueeze(0),
            scale=self.scale,
        )[0, 0]
        spatial = spatial_scores(place, self.method.strides, self.method.sample_scale)
        return AtpScores(
            self_score=normalise_scores(self_score, members, self.method.self_norm),
            cross_score=normalise_scores(cross_score, members, self.method.cross_norm),
            spatial_score=torch.where(visual_slots >= 0, spatial, 0.0),
            self_weight=self.method.self_weight,
        )

    def thresholds(
        self, scores: AtpScores, visual_slots: Tensor, grid_ids: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict θ_r and θ_s of every row's grid, [S] each."""
        num_grids, size = grid_ids.shape[0], self.grid[0] * self.grid[1]
        place = places.index_select(0, visual_slots.clamp(min=0))
        row, column = place[:, 1], place[:, 2]
        if not self.one_grid:
            # Grids of other sizes are brought to that of the heads; tokens that share a cell are averaged.
            row = row * self.grid[0] // place[:, 3].clamp(min=1)
            column = column * self.grid[1] // place[:, 4].clamp(min=1)
        # Text rows land in one extra cell that is cut off.
        inside = place[:, 0] * size + row * self.grid[1] + column
        cell = torch.where(visual_slots >= 0, inside, num_grids * size)

        def by_grid(values: Tensor) -> Tensor:
            flat = values.new_zeros(num_grids * size + 1)
            if self.one_grid:
                return flat.scatter(0, cell, values)[:-1].view(num_grids, size)
            count = flat.scatter_add(0, cell, torch.ones_like(values)).clamp(min=1)
            return (flat.scatter_add(0, cell, values) / count)[:-1].view(num_grids, size)

        theta_r, theta_s = self.heads(by_grid(scores.self_score), by_grid(scores.cross_score))
        return theta_r.index_select(0, place[:, 0]), theta_s.index_select(0, place[:, 0])

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep = (S_red > θ_r) or (S_spatial > θ_s)."""
        visual_slots = inputs[tensor_names.VISUAL_SLOTS]
        grid_ids, places = inputs[tensor_names.GRID_IDS], inputs[tensor_names.VISUAL_PLACES]
        scores = self.scores(
            inputs[tensor_names.query(self.layer - 1)],
            inputs[tensor_names.present_key(self.layer - 1)],
            visual_slots,
            inputs[tensor_names.TEXT_ROWS],
            grid_ids,
            places,
        )
        theta_r, theta_s = self.thresholds(scores, visual_slots, grid_ids, places)
        return select_by_threshold(
            torch.stack((scores.redundant_score, scores.spatial_score)),
            torch.stack((theta_r, theta_s)),
            visual_slots >= 0,
        )
