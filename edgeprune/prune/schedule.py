"""How the learning rate of a training form goes."""

import math


def cosine_with_warmup(highest: float, warmup: float, progress: float) -> float:
    """The learning rate after the share ``progress`` (0 … 1) of the training.

    Args:
        highest: What it rises to.
        warmup: The share of the steps in which it rises, in a line; a cosine follows.
        progress: 0 … 1.
    """
    if progress < warmup:
        return highest * progress / warmup
    return highest * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
