"""ATP's threshold heads, fitted to data: the paper's training, begun near the target.

Ye et al., "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models" (CVPR 2025), §3.3.2-3.3.3, supplement
§4.4. The start is our own: a constant threshold would leave many tokens of one picture and few of another, whatever the
question. So the heads begin as a ridge regression from the scores to the threshold that leaves a given number.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from edgeprune.calib.token_target import check_reachable
from edgeprune.calib.trainer import Across, HardCount, StepLosses, answer_loss, joined_logits
from edgeprune.calib.training_data import TrainingBatch
from edgeprune.errors import PruningError
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.positions import SEQUENTIAL
from edgeprune.prune.atp import Atp, ThresholdHeads
from edgeprune.prune.atp_soft import AtpTraining, SoftPrefill, SoftPrunedDecoder, VisualRows, atp_loss

ANNEALED = AtpTraining(
    temperature_start=150.0,
    temperature_end=2000.0,
    drop_below=1e-6,
    theta_s=0.93,
)
"""The paper's λ and learning rate, with a temperature for heads that begin near the target. Below T = 100, half-open
masks add up to so many tokens that the budget closes sites which hard masks leave open."""

_RIDGE = 3.0
# Thresholds beyond lie where the sigmoid that predicts them is flat.
_LEAST_THRESHOLD = 1e-4


class AtpTrainer:
    """The soft prefill of one model, and the loss of Eq. 12-14."""

    def __init__(
        self, model: VisionLanguageModel, method: Atp, training: AtpTraining, unpruned: float
    ) -> None:
        """Lay fresh heads over the model and freeze it.

        Args:
            model: The model.
            method: Its sites.
            training: With the target.
            unpruned: Visual tokens of an example before pruning, on average over the data.

        Raises:
            PruningError: The method or its target does not fit the model or the data.
        """
        self.soft = SoftPrunedDecoder(model, method, training)
        self.method = method
        self.training = training
        geometry = model.config.geometry
        spans = _spans(method.layers, geometry.num_layers)
        check_reachable(
            method.name,
            training.target_tokens,
            (spans[0] * unpruned + sum(spans[1:])) / geometry.num_layers,
            unpruned,
            "begin earlier with --set layers=[…]",
        )
        self.start_counts = start_counts(method.layers, geometry.num_layers, unpruned, training.target_tokens)
        self._unpruned = unpruned
        self._sequential = geometry.positions == SEQUENTIAL

    @property
    def heads(self) -> nn.Module:
        """The threshold heads of all sites."""
        return self.soft.heads

    @torch.no_grad()
    def start(self, batches: Callable[[], Iterator[TrainingBatch]]) -> list[str]:
        """Begin with thresholds that leave about ``start_counts`` tokens at each site; see the module's docstring.

        A threshold belongs to a grid; where pictures have several, each begins with its part of the tokens.
        """
        told, occupied = [], torch.empty(0)
        for site, count in enumerate(self.start_counts):
            self_score, cross_score = self._scores(site, batches())
            weight = self.method.self_weight
            ranked = (weight * self_score + (1 - weight) * cross_score).sort(dim=1, descending=True).values
            if site == 0:
                # A grid smaller than that of the heads leaves cells empty.
                occupied = ((self_score != 0) | (cross_score != 0)).sum(dim=1, keepdim=True)
            place = (occupied * (count / self._unpruned)).round().long().clamp(1, ranked.shape[1] - 1)
            thresholds = (ranked.gather(1, place - 1) + ranked.gather(1, place)).squeeze(1) / 2
            self._check_in_reach(site, count, thresholds)
            wanted = torch.logit(thresholds, eps=_LEAST_THRESHOLD).double()
            scores = torch.cat((self_score, cross_score), dim=1).double()
            centred = scores - scores.mean(dim=0)
            penalty = _RIDGE * torch.eye(scores.shape[1], dtype=torch.float64, device=scores.device)
            slope = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (wanted - wanted.mean()))
            heads = self.soft.heads[site]
            assert isinstance(heads, ThresholdHeads)
            heads.proj.weight[0], heads.proj.bias[0] = slope.float(), 0.0
            heads.head_r.weight[0, 0] = 1.0
            heads.head_r.bias.fill_(float(wanted.mean() - scores.mean(dim=0) @ slope))
            explained = 1 - (wanted - wanted.mean() - centred @ slope).var() / wanted.var().clamp(min=1e-12)
            told.append(
                f"site {site} begins with {count} tokens; the scores explain {float(explained):.0%} of its threshold"
            )
        return told

    def losses(self, batch: TrainingBatch, progress: float, seed: int, across: Across) -> StepLosses:
        """Soft masks at the temperature of the moment; nothing is drawn."""
        del seed
        prefills = self._run(batch, self.training.temperature(progress))
        tokens = across(torch.cat([prefill.counts for prefill in prefills]).mean())
        costs = [atp_loss(prefill, self.method, self.training, tokens) for prefill in prefills]
        logits = joined_logits([prefill.logits for prefill in prefills])
        return StepLosses(
            answers=answer_loss(logits, batch, across),
            budget=torch.stack(costs).mean(),
            tokens=tokens.detach(),
            right=batch.right(logits),
        )

    @torch.no_grad()
    def measure(self, batch: TrainingBatch) -> HardCount:
        """What inference keeps, token by token."""
        prefills = self._run(batch, math.inf)
        counts = torch.cat([prefill.counts for prefill in prefills])
        logits = joined_logits([prefill.logits for prefill in prefills])
        return HardCount(counts.mean(dim=1), batch.right(logits))

    def _run(self, batch: TrainingBatch, temperature: float) -> list[SoftPrefill]:
        return [self.soft(*inputs, temperature) for inputs in self._inputs(batch)]

    def _inputs(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, VisualRows, Tensor]]:
        """All sequences at once where they have equally many visual tokens in one grid, else one by one."""
        slots = [row[row >= 0] for row in batch.visual_slots]
        alike = set(batch.num_grids) == {1} and len({len(own) for own in slots}) == 1
        size = batch.size if alike and self._sequential else 1
        for first in range(0, batch.size, size):
            part = slice(first, first + size)
            length = int(batch.length[part].max())
            places = [table[own] for table, own in zip(batch.tables[part], slots[part], strict=True)]
            rows = VisualRows(
                (batch.visual_slots[part] >= 0).nonzero()[:, 1].view(len(places), -1),
                torch.stack(places),
                # Of one axis [B, S], of three [3, S].
                batch.position_ids[part, :, :length].flatten(0, 1),
                max(batch.num_grids[part]),
                None if batch.deepstack is None else batch.deepstack[part, :length],
            )
            yield batch.inputs_embeds[part, :length], rows, batch.prompt_length[part]

    def learning_rate_at(self, progress: float) -> float:
        """Of the heads."""
        return self.training.learning_rate_at(progress)

    def weights(self) -> dict[str, Tensor]:
        """The heads."""
        return self.soft.weights()

    def _scores(self, site: int, batches: Iterator[TrainingBatch]) -> tuple[Tensor, Tensor]:
        """What the heads of one site see: S_self and S_cross by grid position, [grids of all samples, N0] each."""
        seen: list[Tensor] = []

        def collect(_: nn.Module, scores: tuple[Tensor, Tensor]) -> None:
            seen.append(torch.stack(scores).flatten(1, 2))
            raise _SeenError

        hook = self.soft.heads[site].register_forward_pre_hook(collect)
        try:
            for batch in batches:
                for inputs in self._inputs(batch):
                    with suppress(_SeenError):
                        self.soft(*inputs, math.inf)
        finally:
            hook.remove()
        self_score, cross_score = torch.cat(seen, dim=1)
        return self_score, cross_score

    def _check_in_reach(self, site: int, count: int, thresholds: Tensor) -> None:
        middle = float(thresholds.median())
        if not _LEAST_THRESHOLD < middle < 1 - _LEAST_THRESHOLD:
            raise PruningError(
                f"atp: {count} tokens behind site {site} need a threshold of {middle:.3g} and thresholds lie between "
                "0 and 1: bring the scores there with --set self_norm=minmax --set cross_norm=minmax"
            )


class _SeenError(Exception):
    """Ends a run at the site whose scores are wanted."""


def start_counts(layers: Sequence[int], num_layers: int, unpruned: float, target: float) -> tuple[int, ...]:
    """Tokens that each site leaves, every site the same share, with the target as mean over the layers."""
    spans = _spans(layers, num_layers)

    def counts(share: float) -> list[float]:
        return [max(1.0, unpruned * share**power) for power in range(len(spans))]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(map(float.__mul__, map(float, spans), counts(middle))) / num_layers
        low, high = (middle, high) if mean < target else (low, middle)
    return tuple(round(count) for count in counts(low)[1:])


def _spans(layers: Sequence[int], num_layers: int) -> list[int]:
    """Layers before the first site, between sites, and behind the last."""
    edges = [0, *layers, num_layers]
    return [end - begin for begin, end in itertools.pairwise(edges)]
