"""What a pruning method brings so that it can be fitted to data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.calib.training_data import IGNORED, TrainingBatch

Across = Callable[[Tensor], Tensor]
"""The mean of a number over all processes, with the gradient of one's own."""


@dataclass(frozen=True)
class StepLosses:
    """What a batch costs.

    Attributes:
        answers: Mean next-token loss of the answers, [].
        budget: What the visual tokens cost, [].
        tokens: Visual tokens on average over layers and batch, [].
        right: [B] bool, whether the whole answer would be given.
    """

    answers: Tensor
    budget: Tensor
    tokens: Tensor
    right: Tensor


@dataclass(frozen=True)
class HardCount:
    """A batch pruned as in inference.

    Attributes:
        tokens: [B], visual tokens on average over layers.
        right: [B] bool.
    """

    tokens: Tensor
    right: Tensor


class Trainer(Protocol):
    """The training form of a method over one model, which lies frozen beside it."""

    @property
    def heads(self) -> nn.Module:
        """The module whose parameters are the method's learned weights."""

    def start(self, batches: Callable[[], Iterator[TrainingBatch]]) -> list[str]:
        """Choose the weights that training begins with; returns what there is to say about them, a line each.

        Raises:
            PruningError: The method cannot reach the target on this data.
        """

    def losses(self, batch: TrainingBatch, progress: float, seed: int, across: Across) -> StepLosses:
        """Run a batch under soft masks.

        Args:
            batch: The batch.
            progress: The share of the training that is over, 0 … 1.
            seed: Of what is drawn in this step.
            across: Joins numbers of several processes.
        """

    def measure(self, batch: TrainingBatch) -> HardCount:
        """Run a batch with masks of 0 and 1."""

    def learning_rate_at(self, progress: float) -> float:
        """Of the heads."""

    def weights(self) -> dict[str, Tensor]:
        """A copy of the learned weights by the names of ``pruning.safetensors``."""


def joined_logits(parts: list[Tensor]) -> Tensor:
    """Logits of a batch [B, S, V], from all at once or from each sequence [1, S_b, V]."""
    if len(parts) == 1:
        return parts[0]
    return nn.utils.rnn.pad_sequence([part[0] for part in parts], batch_first=True)


def answer_loss(logits: Tensor, batch: TrainingBatch, across: Across) -> Tensor:
    """Next-token loss of a batch [B, S, V], averaged over the tokens of all processes together."""
    total = F.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / across(batch.num_targets)
