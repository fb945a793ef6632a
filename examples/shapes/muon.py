"""The optimizer: Muon for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a stack of matrices close to one (Newton-Schulz, quintic)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[-2] > update.shape[-1]
    x: Tensor = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised; matrices of one shape are handled as one stack."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[tuple(matrix.shape)].append(matrix)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update with ``scale`` times the learning rate."""
        rate = self.lr * scale
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            present = [p.grad if p.grad is not None else torch.zeros_like(p) for p in group]
            gradient = torch.stack(present)
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).sub_(change, alpha=rate)


class Optimizer:
    """Muon and AdamW under one schedule: warm-up, a plateau, then a linear fall to zero."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        steps: int,
        *,
        muon_lr: float = 0.02,
        adam_lr: float = 2e-3,
        warmup: int = 60,
        fall: float = 0.4,
    ):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                inner = ".layers." in f".{name}" and parameter.ndim == 2
                (matrices if inner else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.muon = Muon(matrices, muon_lr, 0.95, 0.01)
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.adam_lr, self.steps, self.warmup, self.fall = adam_lr, steps, warmup, fall
        self.done = 0

    def scale(self) -> float:
        """The schedule at the present step."""
        rise = min(1.0, (self.done + 1) / self.warmup)
        return rise * min(1.0, (self.steps - self.done) / max(1.0, self.fall * self.steps))

    def step(self) -> None:
        """One update from the gradients that are there; clears them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        scale = self.scale()
        self.muon.step(scale)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.done += 1
