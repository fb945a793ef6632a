"""IVTP: instruction-guided visual token pruning, training-free, in the vision tower and in the decoder.

Huang et al., "IVTP: Instruction-Guided Visual Token Pruning for Large Vision-Language Models" (ECCV 2024), §3.2-3.4.
Layers form groups of three. At the top layer of a group, between its attention and its MLP, the tokens with the
lowest rolled-out attention from a class token, weighted by the norm of their values (Eq. 4), are dropped. In the
vision tower that token is the CLS token; in the decoder it is a pseudo-CLS token, the mean of the instruction tokens
that CLIP finds relevant to the picture (Eq. 5-8), which scores the others and never enters hidden states or cache.

No code of the authors is public. Where the paper is silent:
  * Rollout (Eq. 3) averages heads first and divides by two after each (A + I), which makes the rows sum to one again;
    the first layer of a group adds no identity. Only the class token's row is propagated, eᵀ(A³+I)(A²+I)A¹, which is
    the same number without an L×L product.
  * ‖V_i‖ is the norm over the concatenated value heads of the group's top layer.
  * A group drops the same number of tokens as its neighbours; the defaults (120 after the tower, 64 after the first
    12 decoder layers) are the one integral schedule that fits the costs printed in Table 9.
  * The pseudo-CLS token is averaged anew from the hidden states entering each layer, sits at the position of the first
    row after the pictures and attends to the rows before it and to itself.
  * Several pictures: the relevance of a text token is its highest over pictures, tokens compete in one ranking, and
    the fallback (no relevant token) is the mean of the pictures' projected class tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgeprune import tensor_names
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut, LlamaDecoder
from edgeprune.models.vision_pruning import TowerAttention, TowerTokens, keep_patches
from edgeprune.operators.attention_score import attention_score
from edgeprune.operators.token_select import select_top_k
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    ProbeSpec,
    PruningMethod,
    SiteSelector,
    check_has_class_token,
)

TEXT_SELECTIONS = ("clip", "all")


@dataclass(frozen=True)
class Ivtp(PruningMethod):
    """Parameters of IVTP.

    Attributes:
        tokens_after_vision: Visual tokens of a tile that leave the vision tower; a picture is one tile, or several.
        tokens_after_decoder: Visual tokens of a tile that are left after the last decoder site.
        decoder_layers: W, the decoder layers that prune.
        group_size: Layers in a group.
        text_selection: "clip" averages the instruction tokens that CLIP finds relevant; "all" averages all of them
            (the paper's ablation without the text tower, Table 6).
        relevance_threshold: τ of Eq. 8.
    """

    tokens_after_vision: int = 120
    tokens_after_decoder: int = 64
    decoder_layers: int = 12
    group_size: int = 3
    text_selection: str = "clip"
    relevance_threshold: float = 0.2

    name: ClassVar[str] = "ivtp"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-64": {},
        "no-text-tower": {"text_selection": "all"},
    }

    def __post_init__(self) -> None:
        if not 1 <= self.tokens_after_decoder <= self.tokens_after_vision:
            raise PruningError(
                f"ivtp: 'tokens_after_decoder' is {self.tokens_after_decoder}, expected 1 … "
                f"{self.tokens_after_vision} (tokens_after_vision)"
            )
        if self.group_size < 1 or self.decoder_layers < 1:
            raise PruningError("ivtp: 'group_size' and 'decoder_layers' must be at least 1")
        if self.text_selection not in TEXT_SELECTIONS:
            raise PruningError(
                f"ivtp: 'text_selection' is '{self.text_selection}', allowed: {', '.join(TEXT_SELECTIONS)}"
            )
        if not math.isfinite(self.relevance_threshold):
            raise PruningError(
                f"ivtp: 'relevance_threshold' is {self.relevance_threshold}, expected a cosine"
            )

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a tower without a class token, more tokens than there are, or more layers than there are."""
        check_has_class_token(self.name, geometry)
        if self.text_selection == "clip" and not geometry.has_clip_tower:
            raise PruningError(
                "ivtp: 'text_selection' is 'clip', and this vision tower is not CLIP's: average all instruction "
                "tokens (text_selection=all, the paper's ablation)"
            )
        if self.tokens_after_vision > geometry.num_patches:
            raise PruningError(
                f"ivtp: 'tokens_after_vision' is {self.tokens_after_vision}, but a picture has "
                f"{geometry.num_patches} visual tokens"
            )
        if self.decoder_layers > geometry.num_layers:
            raise PruningError(
                f"ivtp: 'decoder_layers' is {self.decoder_layers}, but the decoder has {geometry.num_layers} layers"
            )

    def tokens_per_tile(self, geometry: ModelGeometry) -> int:
        """Visual tokens of a tile that leave the tower."""
        del geometry
        return self.tokens_after_vision

    def decoder_groups(self) -> list[range]:
        """The groups of decoder layers."""
        return layer_groups(self.decoder_layers, self.group_size)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """One site between attention and MLP of the top layer of each group."""
        groups = self.decoder_groups()
        counts = equal_steps(self.tokens_after_vision, self.tokens_after_decoder, len(groups))
        return tuple(
            DecoderSite(
                cut=Cut(group[-1], before_mlp=True),
                reads=(
                    *(tensor_names.query(layer) for layer in group[:-1]),
                    *(tensor_names.present_key(layer) for layer in group),
                    *(tensor_names.probe_query(layer) for layer in group),
                    *(tensor_names.probe_key(layer) for layer in group),
                    tensor_names.present_value(group[-1]),
                ),
                host_inputs=(tensor_names.CONTEXT_ROWS, tensor_names.NUM_KEEP),
                keep_per_image=count if geometry.one_tile else None,
                keep_share=None if geometry.one_tile else count / geometry.num_patches,
            )
            for group, count in zip(groups, counts, strict=True)
        )

    def vision_pruner(self, geometry: ModelGeometry) -> "IvtpVisionPruner":
        """The first stage."""
        return IvtpVisionPruner(self.tokens_after_vision, self.group_size, geometry)

    def probe(self, geometry: ModelGeometry) -> ProbeSpec:
        """The pseudo-CLS token."""
        del geometry
        return ProbeSpec(layers=tuple(range(self.decoder_layers)), guided=self.text_selection == "clip")

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "IvtpSelector":
        """The rollout and selection of one group of decoder layers."""
        del weights, decoder
        return IvtpSelector(self.decoder_groups()[site], geometry)


def layer_groups(num_layers: int, group_size: int) -> list[range]:
    """Consecutive groups of layers; the last may be shorter."""
    return [range(start, min(start + group_size, num_layers)) for start in range(0, num_layers, group_size)]


def equal_steps(start: int, end: int, steps: int) -> list[int]:
    """Counts after each of ``steps`` equal reductions from ``start`` to ``end``, rounded."""
    return [start - round((start - end) * (step + 1) / steps) for step in range(steps)]


def weigh_by_value_norm(attention: Tensor, value: Tensor) -> Tensor:
    """Ã_cls,i · ‖V_i‖ (Eq. 4 without its denominator, which does not change the ranking).

    Shapes:
        attention: [B, S] float32; value: [B, H, S, D]; returns [B, S] float32.
    """
    norm = value.float().square().sum(dim=(1, 3)).sqrt()
    return attention * norm


class IvtpVisionPruner(nn.Module):
    """Group-wise pruning inside the vision tower by the rolled-out attention of the CLS token."""

    def __init__(self, tokens_after_vision: int, group_size: int, geometry: ModelGeometry) -> None:
        super().__init__()
        groups = layer_groups(geometry.vision_layers, group_size)
        counts = equal_steps(geometry.num_patches, tokens_after_vision, len(groups))
        self.patches_per_token = geometry.patches_per_token
        self.keep_by_layer = {group[-1]: count for group, count in zip(groups, counts, strict=True)}

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens kept at this layer, None where no group ends."""
        return self.keep_by_layer.get(layer)

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Keep the patch tokens with the highest scores."""
        return keep_patches(tokens, self.select(history, self.keep_by_layer[layer]))

    def select(self, history: Sequence[TowerAttention], num_keep: int) -> Tensor:
        """The tokens with the highest scores, [M, K], ascending; patches that become one token add theirs."""
        top = history[-1].query
        class_row = roll_out_class_row(
            top[:, :, :1],
            torch.zeros(1, dtype=torch.int64, device=top.device),
            [attention.query for attention in history[:-1]],
            [attention.key for attention in history],
            causal=False,
        )
        scores = weigh_by_value_norm(class_row, history[-1].value)[:, 1:]
        if self.patches_per_token > 1:
            scores = scores.view(scores.shape[0], -1, self.patches_per_token).sum(dim=2)
        return ascending_top_k(scores, num_keep)


def roll_out_class_row(
    class_query: Tensor,
    class_index: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    causal: bool,
) -> Tensor:
    """The class token's row of a group's rolled-out attention (Eq. 3), propagated from the top layer down.

    Shapes:
        class_query: [B, H, 1, D]; class_index: [1] int64; queries: [B, H, S, D] each; keys: [B, Hkv, S, D] each.
        returns: [B, S] float32.

    Args:
        class_query: Query of the class token in the top layer.
        class_index: Row of the class token.
        queries: Queries of every row in the layers below the top one, lowest first.
        keys: Keys of every row in all layers of the group, lowest first.
        causal: Whether a row sees only rows up to itself.
    """
    rows = torch.arange(keys[0].shape[2], device=keys[0].device)
    scale = 1 / math.sqrt(class_query.shape[-1])
    one = torch.ones_like(class_query[:, 0, :, :1], dtype=torch.float32)
    row = attention_score(class_query, keys[-1], class_index, one, scale=scale, causal=causal)[:, 0]
    if queries:
        # The top layer's (A + I)/2, of the class token's row alone.
        row = (row + (rows == class_index).float()) / 2
    for layer in range(len(queries) - 1, -1, -1):
        below = attention_score(
            queries[layer], keys[layer], rows, row.unsqueeze(1), scale=scale, causal=causal
        )[:, 0]
        # The lowest layer of a group adds no identity.
        row = below if layer == 0 else (below + row) / 2
    return row


def ascending_top_k(scores: Tensor, num_keep: int) -> Tensor:
    """Indices of the ``num_keep`` highest scores, ties to the lower index, in ascending order.

    Shapes:
        scores: [M, N] float32; returns [M, K] int64.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return order[:, :num_keep].sort(dim=1).values


class IvtpSelector(SiteSelector):
    """Rollout of the pseudo-CLS token through a group of decoder layers, and selection."""

    def __init__(self, group: range, geometry: ModelGeometry) -> None:
        super().__init__()
        self.group = group
        self.scale = 1 / math.sqrt(geometry.head_dim)

    def scores(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Importance of the rows before the instruction, [S'] float32 with S' = number of context rows."""
        context = inputs[tensor_names.CONTEXT_ROWS]
        keys = [
            torch.cat(
                (
                    inputs[tensor_names.present_key(layer)].index_select(2, context),
                    inputs[tensor_names.probe_key(layer)],
                ),
                dim=2,
            )
            for layer in self.group
        ]
        queries = [
            torch.cat(
                (
                    inputs[tensor_names.query(layer)].index_select(2, context),
                    inputs[tensor_names.probe_query(layer)],
                ),
                dim=2,
            )
            for layer in self.group[:-1]
        ]
        # The pseudo-CLS token is the row after the context.
        class_index = torch.full((1,), context.shape[0], dtype=torch.int64, device=context.device)
        class_query = inputs[tensor_names.probe_query(self.group[-1])]
        row = roll_out_class_row(class_query, class_index, queries, keys, causal=True)
        value = inputs[tensor_names.present_value(self.group[-1])].index_select(2, context)
        return weigh_by_value_norm(row[:, :-1], value)[0]

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keep the ``num_keep`` visual tokens with the highest scores."""
        visual_slots = inputs[tensor_names.VISUAL_SLOTS]
        scores = torch.zeros_like(visual_slots, dtype=torch.float32)
        scores = scores.scatter(0, inputs[tensor_names.CONTEXT_ROWS], self.scores(inputs))
        return select_top_k(scores.unsqueeze(0), inputs[tensor_names.NUM_KEEP], visual_slots >= 0)
