"""DyRate: the share of visual tokens that are dropped grows while the answer is generated.

Liang et al., "Dynamic Token Reduction during Generation for Vision Language Models" (2025), §III. At every step the
last row's attention in layer K-1 is summed over four kinds of tokens, {system, image, instruction, response}, for each
head; a linear classifier on those 4·H shares chooses one of R rates, r_k = (k-1)/R, the share removed. In prefill,
visual tokens are ranked by the same attention, mean over heads (FastV), and N - ⌊N·r⌋ stay before layer K; when the
rate grows later, the KV caches from layer K on give up the lowest of the others.

No code of the authors is public. Where the paper is silent or contradicts itself:
  * K = 3 (§IV-D: the same layer as FastV), and the features are those of layer K-1. Prefill has a response share of 0.
  * The number of rates R is not given: 10. r = (k-1)/R is the share removed, as the text says; Eq. 3 as printed would
    keep more with a growing rate.
  * The rate never falls: what left the cache is gone. Kept tokens keep their positions.
  * :mod:`edgeprune.prune.dyrate_soft` has the training form (straight-through Gumbel-softmax).
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
from edgeprune.operators.token_select import select_by_threshold
from edgeprune.prune.method import (
    DecoderSite,
    ModelGeometry,
    PruningMethod,
    RankingSelector,
    RateDecision,
    RateSpec,
    check_layers_increase,
)

TOKEN_KINDS = ("system", "image", "instruction", "response")


@dataclass(frozen=True)
class DyRate(PruningMethod):
    """Parameters of DyRate.

    Attributes:
        layer: K, the decoder layer before which tokens are dropped, 0-based.
        num_rates: R, the rates 0, 1/R … (R-1)/R.
    """

    layer: int = 3
    num_rates: int = 10

    name: ClassVar[str] = "dyrate"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"layer": 3}}

    def __post_init__(self) -> None:
        if self.num_rates < 2:
            raise PruningError(f"dyrate: 'num_rates' is {self.num_rates}, allowed: 2 or more")

    def check(self, geometry: ModelGeometry) -> None:
        """Refuse a layer that the decoder does not have."""
        check_layers_increase(self.name, [self.layer], geometry)

    def decoder_sites(self, geometry: ModelGeometry) -> tuple[DecoderSite, ...]:
        """The site before layer K."""
        del geometry
        return (
            DecoderSite(
                cut=Cut(self.layer),
                reads=(tensor_names.query(self.layer - 1), tensor_names.present_key(self.layer - 1)),
                host_inputs=(),
                keep_per_image=None,
            ),
        )

    def weight_shapes(self, geometry: ModelGeometry) -> Mapping[str, tuple[int, ...]]:
        """The classifier."""
        features = len(TOKEN_KINDS) * geometry.num_heads
        return {"predictor.weight": (self.num_rates, features), "predictor.bias": (self.num_rates,)}

    def selector(
        self, site: int, geometry: ModelGeometry, weights: Mapping[str, Tensor], decoder: LlamaDecoder
    ) -> "DyRateSelector":
        """Ranking and first rate, in prefill."""
        del site, decoder
        return DyRateSelector(self.layer - 1, self._predictor(geometry, weights))

    def rate(self, geometry: ModelGeometry, weights: Mapping[str, Tensor]) -> RateSpec:
        """The classifier that goes on deciding while tokens are generated."""
        return RateSpec(self.layer - 1, self.num_rates, DyRateDecision(self._predictor(geometry, weights)))

    def _predictor(self, geometry: ModelGeometry, weights: Mapping[str, Tensor]) -> "RatePredictor":
        predictor = RatePredictor(geometry.num_heads, self.num_rates)
        prefix = "predictor."
        predictor.linear.load_state_dict(
            {
                name.removeprefix(prefix): weights[name].float()
                for name in (prefix + "weight", prefix + "bias")
            }
        )
        return predictor


class RatePredictor(nn.Module):
    """The linear classifier C_θ over the rates."""

    def __init__(self, num_heads: int, num_rates: int) -> None:
        """Start at the rate 0: zero weights, and a bias that favours it."""
        super().__init__()
        self.linear = nn.Linear(len(TOKEN_KINDS) * num_heads, num_rates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[0] = 1.0

    def forward(self, shares: Tensor) -> Tensor:
        """Logits [R] of the rates from the shares [H, 4]."""
        logits: Tensor = self.linear(shares.flatten(-2))
        return logits


def attention_of_last_row(query: Tensor, key: Tensor) -> Tensor:
    """The last row's attention by head, [H, S] float32.

    Shapes:
        query: [1, H, R, D], of any rows up to the last; key: [1, Hkv, S, D].
    """
    heads, size = query.shape[1], query.shape[3]
    rows = query[0, :, -1].float().view(key.shape[1], -1, size) / math.sqrt(size)
    logits = rows @ key[0].float().transpose(1, 2)
    return logits.softmax(dim=-1).view(heads, -1)


def token_kinds(visual_slots: Tensor) -> Tensor:
    """Which of system, image and instruction a prompt row is, one-hot [S, 3] float32; visual_slots: [S]."""
    visual = visual_slots >= 0
    started = visual.to(torch.int64).cumsum(dim=0) > 0
    return torch.stack((~started, visual, started & ~visual), dim=1).float()


def attention_shares(attention: Tensor, kinds: Tensor) -> Tensor:
    """What each head pays to each kind of token, [H, 4] float32; a row sums to 1.

    Shapes:
        attention: [H, S]; kinds: [S', 3] with S' ≤ S prompt rows; the rows behind them are the response.
    """
    prompt = torch.arange(kinds.shape[0], device=attention.device)
    shares = attention.index_select(1, prompt) @ kinds
    response = (1.0 - shares.sum(dim=1, keepdim=True)).clamp(min=0.0)
    return torch.cat((shares, response), dim=1)


class DyRateSelector(RankingSelector):
    """Ranks the visual tokens and applies the first rate."""

    def __init__(self, layer: int, predictor: RatePredictor) -> None:
        super().__init__()
        self.layer = layer
        self.predictor = predictor

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Keep the N - ⌊N·r⌋ visual tokens with the highest attention."""
        slots = inputs[tensor_names.VISUAL_SLOTS]
        attention = attention_of_last_row(
            inputs[tensor_names.query(self.layer)], inputs[tensor_names.present_key(self.layer)]
        )
        rate = _highest(self.predictor(attention_shares(attention, token_kinds(slots))))
        visual = slots >= 0
        scores = torch.where(visual, attention.mean(dim=0), -1.0)
        order = torch.sort(scores, descending=True, stable=True).indices
        ranks = torch.zeros_like(slots).scatter(0, order, torch.arange(slots.shape[0], device=slots.device))
        ranks = torch.where(visual, ranks, -1)
        num_visual = visual.to(torch.int64).sum()
        num_rates = self.predictor.linear.out_features
        left = num_visual - torch.div(num_visual * rate, num_rates, rounding_mode="floor")
        # By rank and not by a number of rows: that number is computed from data, and no TopK takes such a K.
        keep_indices, keep_count = select_by_threshold(
            -ranks.float().unsqueeze(0), (0.5 - left.float()).expand(1, slots.shape[0]), visual
        )
        return keep_indices, keep_count, {tensor_names.VISUAL_RANKS: ranks}


class DyRateDecision(RateDecision):
    """The rate of one generated token."""

    def __init__(self, predictor: RatePredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, query: Tensor, key: Tensor, visual_slots: Tensor) -> Tensor:
        """Index of the rate, [] int64.

        Shapes:
            query: [1, H, 1, D]; key: [1, Hkv, P + 1, D]; visual_slots: [prompt rows].
        """
        shares = attention_shares(attention_of_last_row(query, key), token_kinds(visual_slots))
        return _highest(self.predictor(shares))


def _highest(logits: Tensor) -> Tensor:
    """Index [] of the highest of [R]; as a matrix of one row, because TensorRT takes no ArgMax of a vector."""
    return logits.unsqueeze(0).argmax(dim=1).squeeze(0)
