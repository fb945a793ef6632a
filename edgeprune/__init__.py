"""Vision-language models with in-network visual-token pruning, from checkpoint to engine."""

__version__ = "0.1.0"
