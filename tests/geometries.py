"""Sizes of real models, for what needs no weights."""

from edgeprune.prune.method import ModelGeometry

LLAVA_7B = ModelGeometry(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    head_dim=128,
    grid=(24, 24),
    vision_layers=23,
    has_class_token=True,
)
