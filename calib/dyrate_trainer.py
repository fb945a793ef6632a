"""DyRate's rate predictor, fitted to data.

Liang et al., "Dynamic Token Reduction during Generation for Vision Language Models" (2025), §III-C, with a term for the
budget, which the paper leaves out: λ·(mean share kept - target)².
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from edgeprune.calib.token_target import check_reachable
from edgeprune.calib.trainer import Across, HardCount, StepLosses, answer_loss
from edgeprune.calib.training_data import TrainingBatch
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.dyrate import DyRate
from edgeprune.prune.dyrate_soft import DyRateTraining, SoftDyRate, budget_loss

# How steeply the first logits fall beside the wanted rate: a draw misses it by one or two.
_STEEPNESS = 0.25


class DyRateTrainer:
    """Sequences one after the other, under the masks of drawn rates."""

    def __init__(
        self,
        model: VisionLanguageModel,
        method: DyRate,
        training: DyRateTraining,
        target: float,
        unpruned: float,
    ) -> None:
        """Lay a fresh classifier over the model and freeze it.

        Args:
            model: The model.
            method: Its site and rates.
            training: How.
            target: Visual tokens, averaged over layers, prompt and answer tokens, and examples.
            unpruned: Visual tokens of an example before pruning, on average over the data.

        Raises:
            PruningError: The method or its target does not fit the model.
        """
        self.soft = SoftDyRate(model, method)
        self.method = method
        self.training = training
        self._num_layers = model.config.geometry.num_layers
        check_reachable(
            method.name,
            target,
            unpruned * self._share_of_layers(1 / method.num_rates),
            unpruned,
            "choose an earlier layer or more rates with --set",
        )
        before = method.layer / self._num_layers
        self.target_share = (target / unpruned - before) / (1 - before)

    @property
    def heads(self) -> nn.Module:
        """The classifier."""
        return self.soft.predictor

    @torch.no_grad()
    def start(self, batches: Callable[[], Iterator[TrainingBatch]]) -> list[str]:
        """Begin with draws about the rate that meets the target, whatever the input."""
        del batches
        rates = torch.arange(self.method.num_rates, dtype=torch.float32)
        wanted = (1 - self.target_share) * self.method.num_rates
        bias = self.soft.predictor.linear.bias
        bias.copy_(-_STEEPNESS * (rates - wanted).square())
        return [f"the classifier begins about the rate {wanted / self.method.num_rates:.2f}"]

    def losses(self, batch: TrainingBatch, progress: float, seed: int, across: Across) -> StepLosses:
        """Rates drawn by a straight-through Gumbel-softmax."""
        draws = torch.Generator(batch.inputs_embeds.device).manual_seed(seed)
        sharpness = self.training.sharpness(progress)
        logits, shares, tokens = self._run(
            batch,
            tau=self.training.tau,
            sharpness=sharpness,
            generator=draws,
        )
        share = across(shares.mean())
        return StepLosses(
            answers=answer_loss(logits, batch, across),
            budget=self.training.lambda_target * budget_loss(share, self.target_share),
            tokens=across(tokens.mean().detach()),
            right=batch.right(logits),
        )

    @torch.no_grad()
    def measure(self, batch: TrainingBatch) -> HardCount:
        """The most likely rates."""
        logits, _, tokens = self._run(batch, tau=None)
        return HardCount(tokens, batch.right(logits))

    def learning_rate_at(self, progress: float) -> float:
        """Of the classifier."""
        return self.training.learning_rate_at(progress)

    def weights(self) -> dict[str, Tensor]:
        """The classifier."""
        return self.soft.weights()

    def _run(
        self,
        batch: TrainingBatch,
        *,
        tau: float | None,
        sharpness: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, S, V], shares kept behind the site [B], and visual tokens averaged over layers [B]."""
        logits, shares, tokens = [], [], []
        for row in range(batch.size):
            slots = batch.visual_slots[row, : batch.prompt_length[row]]
            length = int(batch.length[row])
            answer = self.soft(
                batch.inputs_embeds[row : row + 1, :length],
                slots,
                tau=tau,
                sharpness=sharpness,
                generator=generator,
                position_ids=batch.position_ids[row, :, :length],
                deepstack=None if batch.deepstack is None else batch.deepstack[row, :length],
            )
            logits.append(answer.logits)
            shares.append(answer.masks.mean())
            tokens.append((slots >= 0).sum() * self._share_of_layers(float(answer.masks.detach().mean())))
        padded = nn.utils.rnn.pad_sequence(logits, batch_first=True)
        return padded, torch.stack(shares), torch.stack(tokens)

    def _share_of_layers(self, share: float) -> float:
        """The share of the tokens that an average layer sees, if that share is left behind the site."""
        before = self.method.layer / self._num_layers
        return before + (1 - before) * share
