"""The loop: batches in a fixed order, losses, gradients, a state on disk to go on from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import nn

from edgeprune.calib.processes import Processes, joined
from edgeprune.calib.trainer import Trainer
from edgeprune.calib.training_data import TrainingBatch, TrainingData
from edgeprune.calib.training_state import StateStore
from edgeprune.errors import DataError
from edgeprune.prune.schedule import cosine_with_warmup

_WARMUP = 0.03


@dataclass
class Curves:
    """What every step has cost.

    Attributes:
        answers: Next-token loss.
        budget: What the visual tokens cost.
        tokens: Visual tokens on average over layers and batch, under the soft masks.
        right: Share of the batch whose whole answer would be given.
    """

    answers: list[float] = field(default_factory=list)
    budget: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)


class TrainingProgress(Protocol):
    """Hears what a training does."""

    def step(self, done: int, steps: int, curves: Curves) -> None:
        """``done`` of ``steps`` are over."""

    def say(self, line: str) -> None:
        """Something worth knowing."""


@dataclass(frozen=True)
class Split:
    """Which examples are learned from, and which are measured on.

    Attributes:
        train: Indices, shuffled.
        held_out: Indices; the same as some of ``train`` where there are few.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, count: int, seed: int) -> "Split":
        """A twentieth is held out, at most 200; nothing of less than 200, where a twentieth would say little."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        held = min(200, count // 20) if count >= 200 else 0
        return cls(tuple(order[held:]), tuple(order[: held or 200]))

    def of_step(self, step: int, size: int, seed: int) -> list[int]:
        """The examples of a step: every one once before any comes again."""
        count = len(self.train)
        places = (divmod(place, count) for place in range(step * size, (step + 1) * size))
        return [self.train[_permutation(count, seed + 1 + epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how a training runs.

    Attributes:
        steps: Optimizer steps.
        batch_size: Examples of a step, those of all processes together.
        seed: Of the order and of what is drawn.
        decoder_learning_rate: The highest, where the language model is trained, too.
        save_every: Steps between two states on disk.
        mixed_precision: Whether the model computes in bfloat16 beside weights in float32.
    """

    steps: int
    batch_size: int
    seed: int
    decoder_learning_rate: float
    save_every: int
    mixed_precision: bool = False


def train(
    trainer: Trainer,
    decoder: Mapping[str, nn.Parameter],
    data: TrainingData,
    split: Split,
    options: TrainingOptions,
    processes: Processes,
    store: StateStore,
    progress: TrainingProgress,
) -> Curves:
    """Minimise the answers' loss plus the budget's.

    Args:
        trainer: The method over its model.
        decoder: The language model's parameters, where they are trained, too.
        data: The examples.
        split: Which of them.
        options: How.
        processes: Who trains together.
        store: Where the state lies.
        progress: Hears every step.

    Raises:
        DataError: The batch cannot be divided among the processes, or the loss is no number.
    """
    if options.batch_size % processes.count:
        raise DataError(
            f"a batch of {options.batch_size} cannot be divided among {processes.count} processes: choose a multiple"
        )
    heads = {f"heads.{name}": parameter for name, parameter in trainer.heads.named_parameters()}
    groups = [{"params": list(heads.values())}, {"params": list(decoder.values())}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    named = {**heads, **decoder}
    curves, first = store.load(named, optimizer, Curves), 0
    if curves is None:
        curves = Curves()
        with _precision(options, processes):
            for line in trainer.start(lambda: _some_batches(data, split, options.batch_size)):
                progress.say(line)
        for parameter in heads.values():
            parameter.data.copy_(processes.mean(parameter))
    else:
        first = len(curves.answers)
        progress.say(f"goes on behind step {first}")
    done, whole = first, True
    try:
        for step in range(first, options.steps):
            own = split.of_step(step, options.batch_size, options.seed)[processes.rank :: processes.count]
            share = step / options.steps
            rates = (
                trainer.learning_rate_at(share),
                cosine_with_warmup(options.decoder_learning_rate, _WARMUP, share),
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
            optimizer.zero_grad()
            with _precision(options, processes):
                batch = _batch(data, own, trained=bool(decoder))
                losses = trainer.losses(
                    batch,
                    share,
                    (options.seed * 1_000_003 + step) * processes.count + processes.rank,
                    lambda value: joined(processes, value),
                )
            loss = losses.answers + losses.budget
            # A loss that is no number would spoil the weights; all processes see the same mean.
            if not torch.isfinite(processes.mean(loss)):
                raise DataError(
                    f"the loss of step {step + 1} is no number: lower the learning rate with --train learning_rate=…"
                )
            torch.autograd.backward(loss)
            if processes.count > 1:
                for parameter in named.values():
                    if parameter.grad is not None:
                        parameter.grad.copy_(processes.mean(parameter.grad))
            whole = False
            optimizer.step()
            numbers = (losses.answers, losses.budget, losses.tokens, losses.right.float().mean())
            for curve, number in zip(vars(curves).values(), numbers, strict=True):
                curve.append(float(processes.mean(number)))
            done, whole = step + 1, True
            if done % options.save_every == 0 and done < options.steps:
                store.save(done, named, optimizer, curves)
            progress.step(done, options.steps, curves)
    except KeyboardInterrupt:
        if whole and done > first:
            store.save(done, named, optimizer, curves)
        raise
    return curves


@torch.no_grad()
def measure(
    trainer: Trainer, data: TrainingData, split: Split, options: TrainingOptions, processes: Processes
) -> tuple[float, float]:
    """Mean visual tokens and share of right answers on what is held out, pruned as in inference."""
    tokens, right = [], []
    for start in range(0, len(split.held_out), options.batch_size):
        with _precision(options, processes):
            found = trainer.measure(data.batch(split.held_out[start : start + options.batch_size]))
        tokens.append(found.tokens)
        right.append(found.right)
    return float(torch.cat(tokens).mean()), float(torch.cat(right).float().mean())


# What a start looks at; as many as a ridge regression on a few hundred scores needs.
_START_EXAMPLES = 1200


@torch.no_grad()
def _some_batches(data: TrainingData, split: Split, size: int) -> Iterator[TrainingBatch]:
    chosen = split.train[:_START_EXAMPLES]
    for start in range(0, len(chosen), size):
        yield data.batch(chosen[start : start + size])


def _batch(data: TrainingData, chosen: list[int], *, trained: bool) -> TrainingBatch:
    with torch.set_grad_enabled(trained):
        return data.batch(chosen)


def _precision(options: TrainingOptions, processes: Processes) -> torch.autocast:
    return torch.autocast(processes.device.type, torch.bfloat16, enabled=options.mixed_precision)


def trained_with(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of some parts of a model, made ready to learn, by their names."""
    found = {name: parameter for name, parameter in model.named_parameters() if name.startswith(names)}
    for parameter in found.values():
        # What lies memory-mapped in a file is not to be written to.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return found
