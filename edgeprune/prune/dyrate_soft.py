"""The training form of DyRate: masks instead of dropping, one sequence with its answer at a time.

Liang et al., "Dynamic Token Reduction during Generation for Vision Language Models" (2025), §III-C. The classifier
gives, for the prompt and for every answer token, logits of the rates; a straight-through Gumbel-softmax draws one, and
the mask of that rate (Eq. 3, 5) hides visual tokens from the rows it belongs to (Eq. 6). The model is frozen.
:mod:`edgeprune.prune.dyrate` is the form for inference; with ``tau`` None, the most likely rate is taken instead of a
drawn one, and both agree.

Where the paper is silent:
  * Masks of a prompt hold for all its rows; an answer token's mask is multiplied with those before it, because in
    inference what is dropped is gone. A token always sees itself.
  * No term of the loss asks for fewer tokens, so training would keep them all: :func:`budget_loss` is
    (mean share kept - target)², to be added with a weight.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import PruningError
from edgeprune.models.llama import AttentionFunction, causal_mask, fused_attention, rotary_angles
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.atp_soft import attention_logits, soft_attention
from edgeprune.prune.dyrate import DyRate, RatePredictor, attention_shares, token_kinds
from edgeprune.prune.schedule import cosine_with_warmup


@dataclass(frozen=True)
class DyRateTraining:
    """How the classifier is trained; the paper says only that it is, so the values are our own.

    Attributes:
        tau: Temperature of the Gumbel-softmax.
        sharpness_start, sharpness_end: What the logits are multiplied with before a rate is drawn, in the first and
            the last step, geometric between: at the end the draw is nearly that of inference, the most likely rate.
        lambda_target: Weight of (mean share kept - target)².
        learning_rate, warmup: The highest rate, and the share of the steps in which it rises; a cosine follows.
    """

    tau: float = 1.0
    sharpness_start: float = 1.0
    sharpness_end: float = 20.0
    lambda_target: float = 10.0
    learning_rate: float = 0.02
    warmup: float = 0.03

    def __post_init__(self) -> None:
        for names, low, high in (
            ("tau sharpness_start sharpness_end learning_rate", 1e-9, math.inf),
            ("lambda_target", 0, math.inf),
            ("warmup", 0, 1),
        ):
            for name in names.split():
                if not low <= getattr(self, name) < high:
                    allowed = f"from {low} to below {high}"
                    raise PruningError(
                        f"dyrate training: '{name}' is {getattr(self, name)}, allowed: {allowed}"
                    )

    def sharpness(self, progress: float) -> float:
        """The factor after the share ``progress`` (0 … 1) of the training."""
        return float(self.sharpness_start * (self.sharpness_end / self.sharpness_start) ** progress)

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate after the share ``progress`` (0 … 1)."""
        return cosine_with_warmup(self.learning_rate, self.warmup, progress)


class SoftAnswer(NamedTuple):
    """A sequence under the masks of its rates.

    Shapes:
        logits: [S, V].
        masks: [1 + T, N], of the prompt and of every answer token.
        rate_logits: [1 + T, R].
    """

    logits: Tensor
    masks: Tensor
    rate_logits: Tensor


def rate_masks(ranks: Tensor, num_rates: int) -> Tensor:
    """m^k, [R, N] float32: rate k keeps the N - ⌊N·k/R⌋ tokens of the lowest ranks; ranks: [N], 0 the highest."""
    count = ranks.shape[0]
    k = torch.arange(num_rates, device=ranks.device)
    left = count - torch.div(count * k, num_rates, rounding_mode="floor")
    return (ranks[None, :] < left[:, None]).float()


def choose_rates(logits: Tensor, tau: float | None, generator: torch.Generator | None = None) -> Tensor:
    """One-hot rates [T, R] with the gradient of the softmax (Eq. 4); ``tau`` None takes the most likely one."""
    if tau is None:
        hard = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
        soft = logits.softmax(dim=-1)
    else:
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-9, 1 - 1e-7)
        soft = ((logits - (-uniform.log()).log()) / tau).softmax(dim=-1)
        hard = F.one_hot(soft.argmax(dim=-1), logits.shape[-1]).float()
    return hard + soft - soft.detach()


def budget_loss(masks: Tensor, target: float) -> Tensor:
    """(mean share of visual tokens kept - target)²."""
    return (masks.mean() - target).square()


class SoftDyRate(nn.Module):
    """A decoder under masks; its only parameters are the classifier's, the model is frozen at first."""

    def __init__(self, model: VisionLanguageModel, method: DyRate) -> None:
        """Lay a fresh classifier over the model and freeze it.

        Raises:
            PruningError: The method does not fit the model.
        """
        super().__init__()
        geometry = model.config.geometry
        method.check(geometry)
        # Inside a tuple, so that the model's parameters do not become this module's.
        self._model = (model.requires_grad_(False),)
        self.method = method
        self.predictor = RatePredictor(geometry.num_heads, method.num_rates)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the classifier by the names that ``pruning.safetensors`` uses."""
        state = self.predictor.linear.state_dict()
        return {
            f"{self.method.name}.predictor.{name}": tensor.detach().clone() for name, tensor in state.items()
        }

    def forward(
        self,
        inputs_embeds: Tensor,
        visual_slots: Tensor,
        *,
        tau: float | None = 1.0,
        sharpness: float = 1.0,
        generator: torch.Generator | None = None,
        position_ids: Tensor | None = None,
        deepstack: Tensor | None = None,
    ) -> SoftAnswer:
        """Run one sequence.

        Shapes:
            inputs_embeds: [1, P + T, C], a prompt and its answer; visual_slots: [P], of the prompt;
            position_ids: [A, P + T]; deepstack: [P + T, J, C].

        Args:
            inputs_embeds: The embeddings.
            visual_slots: Slots of the prompt's rows.
            tau: Temperature of the Gumbel-softmax; None takes the most likely rate.
            sharpness: What the logits are multiplied with before a rate is drawn: the higher, the surer the draw.
            generator: Of the draws.
            position_ids: Of all rows; one after the other by default.
            deepstack: What DeepStack adds behind the first J layers, if it does.
        """
        model = self._model[0]
        config = model.config.decoder
        length, prompt = inputs_embeds.shape[1], visual_slots.shape[0]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
        angles = rotary_angles(config, position_ids, inputs_embeds.dtype)
        visible = causal_mask(length, 0, inputs_embeds.device)
        attend: AttentionFunction = fused_attention
        hidden, masks, logits = inputs_embeds, torch.empty(0), torch.empty(0)
        for index in range(config.num_layers):
            layer = model.language_model.layer(index)
            attention = layer.attention(hidden, angles, visible, attend=attend)
            hidden = layer.feed_forward(attention.hidden)
            if deepstack is not None and index < deepstack.shape[1]:
                hidden = hidden + deepstack[:, index]
            if index == self.method.layer - 1:
                rows = attention_logits(attention.query, attention.key)[0, :, prompt - 1 :]
                rows = rows.masked_fill(~visible[0, :, prompt - 1 :], -torch.inf).softmax(dim=-1)
                masks, logits = self._masks(rows, visual_slots, tau, sharpness, generator)
                attend = soft_attention(self._gate(masks, visual_slots, length).unsqueeze(0))
        return SoftAnswer(model.head(hidden)[0], masks, logits)

    def _masks(
        self,
        attention: Tensor,
        visual_slots: Tensor,
        tau: float | None,
        sharpness: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Masks [1 + T, N] and logits [1 + T, R] from the attention [H, 1 + T, S] of the deciding rows."""
        kinds, visual = token_kinds(visual_slots), torch.nonzero(visual_slots >= 0)[:, 0]
        shares = torch.stack([attention_shares(row, kinds) for row in attention.unbind(dim=1)])
        with torch.autocast(shares.device.type, enabled=False):
            logits = self.predictor(shares)
        order = torch.sort(attention[:, 0].mean(dim=0)[visual], descending=True, stable=True).indices
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        chosen = choose_rates(sharpness * logits, tau, generator)
        return (chosen @ rate_masks(ranks, self.method.num_rates)).cumprod(dim=0), logits

    @staticmethod
    def _gate(masks: Tensor, visual_slots: Tensor, length: int) -> Tensor:
        """What each row sees of each, [S, S]: the prompt's rows by the first mask, an answer's by its own."""
        visual = torch.nonzero(visual_slots >= 0)[:, 0]
        device = visual_slots.device
        before = torch.zeros(len(visual_slots) - 1, dtype=torch.int64, device=device)
        rows = torch.cat((before, torch.arange(len(masks), device=device)))
        gate = torch.ones(length, length, dtype=masks.dtype, device=device)
        return gate.index_copy(1, visual, masks[rows])
