"""The training form of ATP: nothing is dropped, soft masks decide how much the others see of a visual token.

Ye et al., "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models" (CVPR 2025), §3.3.2-3.3.3
and supplement §4.4. The decoder is frozen, only the threshold heads learn. :mod:`edgeprune.prune.atp` is the
form for inference, which drops tokens; both agree where no score is nearer to its threshold than about 10/T.

Where the paper is silent:
  * A mask is multiplied with those of the sites before it: what is pruned stays pruned.
  * Scores, their means over visual queries and their norms are weighted by the mask of the sites before, and
    multiplied by it before they enter the threshold heads: the heads see what they see in inference.
  * A token always sees itself (G_ii = 1), as in DynamicViT, which the paper cites for the masked softmax.
  * Where no token would be left, the one with the highest S_red is. N̄ is the mean over all layers and the batch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgeprune.errors import PruningError
from edgeprune.models.llama import (
    AttentionFunction,
    AttentionOutput,
    causal_mask,
    fused_attention,
    rotary_angles,
)
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.atp import Atp, ThresholdHeads, grid_places, spatial_scores
from edgeprune.prune.schedule import cosine_with_warmup

SOFTMAX_EPS = 1e-6


@dataclass(frozen=True)
class AtpTraining:
    """How the threshold heads are trained. The defaults are the paper's, for 576 visual tokens.

    At the paper's temperature a mask has a gradient only within about 1e-5 of its threshold. Train with a rising
    one: from 10 whatever the start, from a few hundred if the start is near the budget.

    Attributes:
        temperature_start, temperature_end: T of Eq. 9 and 10 in the first and the last step; geometric between.
        drop_below: Tokens whose mask is below it are not computed, equally many of each picture. 0, the paper's
            form, computes them all; 1e-6 is faster and the same in float32.
        lambda_atp: Weight of the tokens that each site leaves (Eq. 12).
        lambda_target, target_tokens: Weight of the distance to N_target, and N_target (Eq. 13).
        learning_rate, warmup: The highest rate, and the share of the steps in which it rises; a cosine follows.
        theta_r, theta_s: Thresholds of S_red and S_spatial that training begins with.
    """

    temperature_start: float = 1e6
    temperature_end: float = 1e6
    drop_below: float = 0.0
    lambda_atp: float = 0.1
    lambda_target: float = 0.2
    target_tokens: float = 130.0
    learning_rate: float = 1e-4
    warmup: float = 0.03
    theta_r: float = 0.02
    theta_s: float = 0.5

    def __post_init__(self) -> None:
        for names, low, high in (
            ("temperature_start temperature_end target_tokens learning_rate", 1e-9, math.inf),
            ("lambda_atp lambda_target", 0, math.inf),
            ("warmup drop_below", 0, 1),
            ("theta_r theta_s", 1e-9, 1),
        ):
            for name in names.split():
                if not low <= getattr(self, name) < high:
                    allowed = f"from {low} to below {high}"
                    raise PruningError(f"atp training: '{name}' is {getattr(self, name)}, allowed: {allowed}")

    def temperature(self, progress: float) -> float:
        """T after the share ``progress`` (0 … 1) of the training."""
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** progress)

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate after the share ``progress`` (0 … 1)."""
        return cosine_with_warmup(self.learning_rate, self.warmup, progress)


class SoftSite(NamedTuple):
    """One site's thresholds θ [B, G] and its mask [B, K], the masks of the sites before it multiplied in."""

    mask: Tensor
    theta_r: Tensor
    theta_s: Tensor


class SoftPrefill(NamedTuple):
    """Logits [B, S, V], sites, and the visual tokens that enter each layer, [B, L]: sums of the masks."""

    logits: Tensor
    sites: tuple[SoftSite, ...]
    counts: Tensor


def masked_softmax(logits: Tensor, gate: Tensor, visible: Tensor) -> Tensor:
    """exp(a_ij)·G_ij / Σ_k exp(a_ik)·G_ik over the visible entries, [B, H, R, S] float32."""
    logits = logits.float()
    weights = torch.where(visible, gate, 0.0)
    with torch.no_grad():
        # Of the weighted entries: a pruned token's large logit must not push the others' exponentials to 0.
        peak = (logits + weights.log()).amax(dim=-1, keepdim=True)
    # exp of more is not finite; the mask beside it is 0 anyway.
    exponentials = (logits - peak).clamp(max=80).exp() * weights
    return exponentials / (exponentials.sum(dim=-1, keepdim=True) + SOFTMAX_EPS)


def soft_attention(gate: Tensor) -> AttentionFunction:
    """Attention that sees row j as far as ``gate`` lets it, for ``LlamaLayer.attention``.

    Shapes:
        gate: [B, S], the same for all rows that look, or [B, S, S] with gates of its own for each of them.
    """
    itself = torch.eye(gate.shape[-1], dtype=torch.bool, device=gate.device)
    by_row = gate.unsqueeze(1) if gate.dim() == 2 else gate
    gates = torch.where(itself, 1.0, by_row).unsqueeze(1)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        probabilities = masked_softmax(attention_logits(query, key), gates, mask).to(value.dtype)
        batch, heads, rows, columns = probabilities.shape
        per_key_head = probabilities.view(batch, value.shape[1], -1, columns) @ value
        return per_key_head.view(batch, heads, rows, -1)

    return attend


class VisualRows(NamedTuple):
    """Where the visual tokens of a batch are; every sequence has equally many.

    Shapes:
        rows: [B, K] int64, their rows, ascending.
        places: [B, K, 5] int64: grid, row, column, rows and columns of the grid (``VisualLayout.table``).
        position_ids: [B, S] int64; [3, S] for one sequence of a family with positions on three axes.
        num_grids: G, grids of a sequence.
        deepstack: [B, S, J, C], what DeepStack adds behind the first J layers, if it does.
    """

    rows: Tensor
    places: Tensor
    position_ids: Tensor
    num_grids: int
    deepstack: Tensor | None = None

    @classmethod
    def of_one_picture(cls, picture_start: Tensor, grid: tuple[int, int], length: int) -> "VisualRows":
        """Sequences of ``length`` rows with one whole picture each, from the rows where it begins [B]."""
        places = grid_places(grid).to(picture_start.device)
        rows = picture_start.unsqueeze(1) + torch.arange(places.shape[0], device=picture_start.device)
        position_ids = torch.arange(length, device=picture_start.device)
        batch = picture_start.shape[0]
        return cls(rows, places.expand(batch, -1, -1), position_ids.expand(batch, -1), 1)


class SoftPrunedDecoder(nn.Module):
    """A decoder under soft masks; its only parameters are the threshold heads, the model is frozen at first."""

    def __init__(self, model: VisionLanguageModel, method: Atp, training: AtpTraining) -> None:
        """Lay fresh heads over the model and freeze it.

        Raises:
            PruningError: The method does not fit the model.
        """
        super().__init__()
        geometry = model.config.geometry
        method.check(geometry)
        # Inside a tuple, so that the model's parameters do not become this module's.
        self._model = (model.requires_grad_(False),)
        self.method = method
        self.options = training
        self.grid = geometry.grid
        thetas = {"theta_r": training.theta_r, "theta_s": training.theta_s}
        self.heads = nn.ModuleList(
            ThresholdHeads(geometry.num_patches, method.hidden_width, **thetas) for _ in method.layers
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy of the heads by the names that ``pruning.safetensors`` uses."""
        return {
            f"{self.method.name}.site{site}.{name}": tensor.detach().clone()
            for site, heads in enumerate(self.heads)
            for name, tensor in heads.state_dict().items()
        }

    def forward(
        self, inputs_embeds: Tensor, visual: VisualRows, prompt_length: Tensor, temperature: float
    ) -> SoftPrefill:
        """Run sequences, padded on the right.

        S_cross averages over the text between the last picture and the answer: in inference there is no answer yet.

        Args:
            inputs_embeds: [B, S, C], prompts with their answers.
            visual: Where the visual tokens are.
            prompt_length: [B] int64, rows before the answers.
            temperature: T; infinity gives masks of 0 and 1, those of inference, without a gradient.
        """
        model, (batch, length, _) = self._model[0], inputs_embeds.shape
        origin = torch.arange(length, device=inputs_embeds.device).expand(batch, -1)
        is_text = (origin > visual.rows[:, -1:]) & (origin < prompt_length.unsqueeze(1))
        gate = torch.ones_like(is_text, dtype=torch.float32)
        tokens = torch.arange(visual.rows.shape[1], device=inputs_embeds.device).expand(batch, -1)
        state = _State(inputs_embeds, origin, is_text, gate, tokens, visual.rows)
        attend: AttentionFunction = fused_attention
        attention: AttentionOutput | None = None
        sites, counts, count = list[SoftSite](), list[Tensor](), state.alive.sum(dim=1)
        for index in range(model.config.decoder.num_layers):
            if attention is not None and index in self.method.layers:
                site = self._site(len(sites), attention, state, visual, temperature)
                gate = torch.ones_like(state.gate).scatter(1, state.rows, site.mask.gather(1, state.tokens))
                state = state._replace(gate=gate).drop(self.options.drop_below)
                attend, count = soft_attention(state.gate), site.mask.sum(dim=1)
                sites.append(site)
            counts.append(count)
            layer = model.language_model.layer(index)
            # One sequence may have several axes, and several sequences one each.
            position_ids = visual.position_ids.gather(
                1, state.origin.expand(visual.position_ids.shape[0], -1)
            )
            angles = rotary_angles(model.config.decoder, position_ids, state.hidden.dtype)
            visible = causal_mask(state.hidden.shape[1], 0, state.hidden.device)
            attention = layer.attention(state.hidden, angles, visible, attend=attend)
            hidden = layer.feed_forward(attention.hidden)
            if visual.deepstack is not None and index < visual.deepstack.shape[2]:
                hidden = hidden + _take(visual.deepstack[:, :, index], state.origin)
            state = state._replace(hidden=hidden)
        rows = state.origin.unsqueeze(2).expand_as(state.hidden)
        hidden = torch.zeros_like(inputs_embeds).scatter(1, rows, state.hidden)
        return SoftPrefill(model.head(hidden), tuple(sites), torch.stack(counts, dim=1))

    def _site(
        self,
        index: int,
        attention: AttentionOutput,
        state: "_State",
        visual: VisualRows,
        temperature: float,
    ) -> SoftSite:
        """Thresholds and mask (Eq. 6-11)."""
        alive = state.alive
        places = _take(visual.places, state.tokens)
        grids = torch.arange(visual.num_grids, device=places.device).unsqueeze(1)
        members = (places[:, None, :, 0] == grids).float()
        self_score = _by_grid(_self_score(attention, state, members), members, alive, self.method.self_norm)
        cross_score = _cross_score(attention, state).unsqueeze(1).expand_as(members)
        cross_score = _by_grid(cross_score, members, alive, self.method.cross_norm)
        seen = (
            self._by_cell(scores * alive, places, visual.num_grids, alive)
            for scores in (self_score, cross_score)
        )
        with torch.autocast(alive.device.type, enabled=False):
            theta_r, theta_s = self.heads[index](*seen)
        weight = self.method.self_weight
        redundant = weight * self_score + (1 - weight) * cross_score
        spatial = spatial_scores(places.flatten(0, 1), self.method.strides, self.method.sample_scale)
        own = places[:, :, 0]
        margin = torch.maximum(
            redundant - theta_r.gather(1, own), spatial.view_as(redundant) - theta_s.gather(1, own)
        )
        passes = (margin > 0).float() if math.isinf(temperature) else torch.sigmoid(margin * temperature)
        mask = passes * alive
        best = torch.where(alive > 0.5, redundant, -math.inf).argmax(dim=1, keepdim=True)
        none_left = (mask <= 0.5).all(dim=1, keepdim=True)
        survivor = torch.zeros_like(mask).scatter(1, best, none_left.float())
        whole = mask.new_zeros(mask.shape[0], visual.rows.shape[1])
        return SoftSite(whole.scatter(1, state.tokens, torch.maximum(mask, survivor)), theta_r, theta_s)

    def _by_cell(self, values: Tensor, places: Tensor, num_grids: int, alive: Tensor) -> Tensor:
        """Values [B, K] in the cells of the heads' grid, [B, G, N0]; tokens that share a cell are averaged."""
        rows, columns = self.grid
        row = places[:, :, 1] * rows // places[:, :, 3].clamp(min=1)
        column = places[:, :, 2] * columns // places[:, :, 4].clamp(min=1)
        cell = (places[:, :, 0] * rows + row) * columns + column
        empty = values.new_zeros(values.shape[0], num_grids * rows * columns)
        count = empty.scatter_add(1, cell, alive).clamp(min=1)
        return (empty.scatter_add(1, cell, values) / count).view(-1, num_grids, rows * columns)


def atp_loss(
    prefill: SoftPrefill, method: Atp, training: AtpTraining, mean_count: Tensor | None = None
) -> Tensor:
    """λ_ATP·L_ATP + λ_target·L_target (Eq. 12-14), a scalar: the loss without the next-token prediction.

    Args:
        prefill: The batch.
        method: Its sites.
        training: λ_ATP, λ_target and N_target.
        mean_count: N̄, where the batch is a part of a larger one; by default that of the batch.
    """
    shares = [site.mask.mean() * layer for site, layer in zip(prefill.sites, method.layers, strict=True)]
    mean_count = prefill.counts.mean() if mean_count is None else mean_count
    distance = (mean_count - training.target_tokens).abs()
    return training.lambda_atp * torch.stack(shares).sum() + training.lambda_target * distance


def soft_normalise(scores: Tensor, alive: Tensor, norm: str) -> Tensor:
    """``normalise_scores`` of :mod:`edgeprune.prune.atp` for rows [..., K]; who is alive by a half is a member."""
    if norm == "sigmoid":
        return torch.sigmoid(scores)
    if norm == "minmax":
        members = alive > 0.5
        low = torch.where(members, scores, math.inf).amin(dim=-1, keepdim=True)
        high = torch.where(members, scores, -math.inf).amax(dim=-1, keepdim=True)
        return ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return scores


def _by_grid(scores: Tensor, members: Tensor, alive: Tensor, norm: str) -> Tensor:
    """Scores of the tokens for every grid [B, G, K], normalised within each, → each token's for its own [B, K]."""
    own = soft_normalise(scores, members * alive.unsqueeze(1), norm)
    return torch.where(members > 0, own, 0.0).sum(dim=1)


class _State(NamedTuple):
    """The rows that a batch computes at some depth.

    Shapes:
        hidden: [B, S, C]; origin: [B, S], their rows in the whole sequence; is_text: [B, S], the rows between pictures
        and answer; gate: [B, S]; tokens: [B, K], which visual tokens are left; rows: [B, K], where they are now.
    """

    hidden: Tensor
    origin: Tensor
    is_text: Tensor
    gate: Tensor
    tokens: Tensor
    rows: Tensor

    @property
    def alive(self) -> Tensor:
        """The mask of the visual tokens, [B, K]."""
        return self.gate.gather(1, self.rows)

    def drop(self, limit: float) -> "_State":
        """Leave out visual tokens whose mask is below the limit, equally many of every picture."""
        num_kept = int((self.alive >= limit).sum(dim=1).max())
        if num_kept == self.rows.shape[1]:
            return self
        kept = self.alive.topk(num_kept).indices.sort().values
        stays = torch.ones_like(self.is_text).scatter(1, self.rows, False)
        stays = stays.scatter(1, self.rows.gather(1, kept), True)
        order = stays.nonzero()[:, 1].view(stays.shape[0], -1)
        rows = (stays.cumsum(dim=1) - 1).gather(1, self.rows.gather(1, kept))
        hidden, origin, is_text, gate = (_take(x, order) for x in self[:4])
        return _State(hidden, origin, is_text, gate, _take(self.tokens, kept), rows)


def _self_score(attention: AttentionOutput, state: _State, members: Tensor) -> Tensor:
    """S_self of every token for every grid [B, G, K] (Eq. 3): the mean over queries commutes with the product."""
    weights = members * state.alive.unsqueeze(1)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=SOFTMAX_EPS)
    visual_query = _take(attention.query.transpose(1, 2), state.rows).float()
    with torch.autocast(weights.device.type, enabled=False):
        mean_query = torch.einsum("bgk,bkhd->bhgd", weights, visual_query)
    logits = attention_logits(mean_query, attention.key).mean(dim=1)
    return logits.gather(2, state.rows.unsqueeze(1).expand(-1, members.shape[1], -1))


def _cross_score(attention: AttentionOutput, state: _State) -> Tensor:
    """S_cross [B, K] (Eq. 4)."""
    first = int(state.rows[:, -1].min()) + 1
    logits = attention_logits(attention.query[:, :, first:], attention.key)
    visible = causal_mask(attention.key.shape[2], 0, logits.device)[:, :, first:]
    probabilities = masked_softmax(logits, state.gate[:, None, None], visible).mean(dim=1)
    text = state.is_text[:, first:].float()
    text = text / text.sum(dim=1, keepdim=True).clamp(min=1)
    return (text.unsqueeze(2) * probabilities).sum(dim=1).gather(1, state.rows)


def attention_logits(query: Tensor, key: Tensor) -> Tensor:
    """q·k/√D in float32: [B, H, R, D], [B, Hkv, S, D] → [B, H, R, S]."""
    batch, heads, rows, width = query.shape
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.reshape(batch, key.shape[1], -1, width).float()
        return (grouped @ key.float().transpose(2, 3)).view(batch, heads, rows, -1) / math.sqrt(width)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """[B, N, …] at [B, K] → [B, K, …]."""
    return x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), order]
