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
from edgeprune.positions import SEQUENTIAL
from edgeprune.prune.atp import Atp, ThresholdHeads, grid_places, spatial_scores
from edgeprune.prune.method import ModelGeometry
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
    """One site's thresholds θ [B] and its mask [B, N0], the masks of the sites before it multiplied in."""

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


def check_trainable(name: str, geometry: ModelGeometry) -> None:
    """Refuse a model whose rows have positions that the training forms do not give them.

    Raises:
        PruningError: With the models that work.
    """
    if geometry.positions != SEQUENTIAL:
        raise PruningError(
            f"{name}: the training form numbers rows one after the other, and this family's have positions on three "
            "axes; train with a model of the family llava"
        )


class SoftPrunedDecoder(nn.Module):
    """A decoder under soft masks; its only parameters are the threshold heads, the model is frozen at first."""

    spatial: Tensor

    def __init__(self, model: VisionLanguageModel, method: Atp, training: AtpTraining) -> None:
        """Lay fresh heads over the model and freeze it.

        Raises:
            PruningError: The method, or its training, does not fit the model.
        """
        super().__init__()
        geometry = model.config.geometry
        method.check(geometry)
        check_trainable(method.name, geometry)
        if not geometry.one_size:
            raise PruningError(
                f"{method.name}: the training form takes pictures of one size, and this family's differ; train with a "
                "model of the family llava"
            )
        # Inside a tuple, so that the model's parameters do not become this module's.
        self._model = (model.requires_grad_(False),)
        self.method = method
        self.options = training
        self.num_patches = geometry.num_patches
        thetas = {"theta_r": training.theta_r, "theta_s": training.theta_s}
        self.heads = nn.ModuleList(
            ThresholdHeads(self.num_patches, method.hidden_width, **thetas) for _ in method.layers
        )
        spatial = spatial_scores(grid_places(geometry.grid), method.strides, method.sample_scale)
        self.register_buffer("spatial", spatial, persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the heads by the names that ``pruning.safetensors`` uses."""
        return {
            f"{self.method.name}.site{site}.{name}": tensor.detach().clone()
            for site, heads in enumerate(self.heads)
            for name, tensor in heads.state_dict().items()
        }

    def forward(
        self, inputs_embeds: Tensor, picture_start: Tensor, prompt_length: Tensor, temperature: float
    ) -> SoftPrefill:
        """Run sequences with one whole picture each, padded on the right.

        S_cross averages over the text between picture and answer: in inference there is no answer yet.

        Args:
            inputs_embeds: [B, S, C], prompts with their answers.
            picture_start: [B] int64, rows of the first visual tokens.
            prompt_length: [B] int64, rows before the answers.
            temperature: T; infinity gives masks of 0 and 1, those of inference, without a gradient.
        """
        model, batch = self._model[0], inputs_embeds.shape[0]
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).expand(batch, -1)
        slots = position_ids[:, : self.num_patches]
        rows = picture_start.unsqueeze(1) + slots
        is_text = (position_ids > rows[:, -1:]) & (position_ids < prompt_length.unsqueeze(1))
        gate = torch.ones_like(is_text, dtype=torch.float32)
        state = _State(inputs_embeds, position_ids, is_text, gate, slots, rows)
        attend: AttentionFunction = fused_attention
        attention: AttentionOutput | None = None
        sites, counts, count = list[SoftSite](), list[Tensor](), state.alive.sum(dim=1)
        for index in range(model.config.decoder.num_layers):
            if attention is not None and index in self.method.layers:
                site = self._site(len(sites), attention, state, temperature)
                gate = torch.ones_like(state.gate).scatter(1, state.rows, site.mask.gather(1, state.slots))
                state = state._replace(gate=gate).drop(self.options.drop_below)
                attend, count = soft_attention(state.gate), site.mask.sum(dim=1)
                sites.append(site)
            counts.append(count)
            layer = model.language_model.layer(index)
            angles = rotary_angles(model.config.decoder, state.position_ids, state.hidden.dtype)
            visible = causal_mask(state.hidden.shape[1], 0, state.hidden.device)
            attention = layer.attention(state.hidden, angles, visible, attend=attend)
            state = state._replace(hidden=layer.feed_forward(attention.hidden))
        places = state.position_ids.unsqueeze(2).expand_as(state.hidden)
        hidden = torch.zeros_like(inputs_embeds).scatter(1, places, state.hidden)
        return SoftPrefill(model.head(hidden), tuple(sites), torch.stack(counts, dim=1))

    def _site(self, index: int, attention: AttentionOutput, state: "_State", temperature: float) -> SoftSite:
        """Thresholds and mask (Eq. 6-11)."""
        alive = state.alive
        self_score = soft_normalise(_self_score(attention, state), alive, self.method.self_norm)
        cross_score = soft_normalise(_cross_score(attention, state), alive, self.method.cross_norm)
        grid = alive.new_zeros(alive.shape[0], self.num_patches)
        seen = (grid.scatter(1, state.slots, scores * alive) for scores in (self_score, cross_score))
        with torch.autocast(grid.device.type, enabled=False):
            theta_r, theta_s = self.heads[index](*seen)
        weight = self.method.self_weight
        redundant = weight * self_score + (1 - weight) * cross_score
        spatial = self.spatial[state.slots]
        margin = torch.maximum(redundant - theta_r.unsqueeze(1), spatial - theta_s.unsqueeze(1))
        passes = (margin > 0).float() if math.isinf(temperature) else torch.sigmoid(margin * temperature)
        mask = passes * alive
        best = torch.where(alive > 0.5, redundant, -math.inf).argmax(dim=1, keepdim=True)
        none_left = (mask <= 0.5).all(dim=1, keepdim=True)
        survivor = torch.zeros_like(mask).scatter(1, best, none_left.float())
        return SoftSite(grid.scatter(1, state.slots, torch.maximum(mask, survivor)), theta_r, theta_s)


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
    """``normalise_scores`` of :mod:`edgeprune.prune.atp` for a batch [B, K]; who is alive by a half is a member."""
    if norm == "sigmoid":
        return torch.sigmoid(scores)
    if norm == "minmax":
        members = alive > 0.5
        low = torch.where(members, scores, math.inf).amin(dim=1, keepdim=True)
        high = torch.where(members, scores, -math.inf).amax(dim=1, keepdim=True)
        return ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return scores


class _State(NamedTuple):
    """The rows that a batch computes at some depth.

    Shapes:
        hidden: [B, S, C]; position_ids, gate: [B, S]; is_text: [B, S], the rows between picture and answer;
        slots: [B, K], grid positions of the visual tokens; rows: [B, K], their rows, consecutive.
    """

    hidden: Tensor
    position_ids: Tensor
    is_text: Tensor
    gate: Tensor
    slots: Tensor
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
        hidden, position_ids, is_text, gate = (_take(x, order) for x in self[:4])
        return _State(hidden, position_ids, is_text, gate, _take(self.slots, kept), self.rows[:, :num_kept])


def _self_score(attention: AttentionOutput, state: _State) -> Tensor:
    """S_self [B, K] (Eq. 3): the mean over queries commutes with the product, as in inference."""
    weights = state.alive / state.alive.sum(dim=1, keepdim=True).clamp(min=SOFTMAX_EPS)
    visual_query = _take(attention.query.transpose(1, 2), state.rows).float()
    mean_query = (weights[:, :, None, None] * visual_query).sum(dim=1).unsqueeze(2)
    return attention_logits(mean_query, attention.key).mean(dim=1).squeeze(1).gather(1, state.rows)


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
