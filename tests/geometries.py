"""Sizes of real models, for what needs no weights."""

from edgeprune.manifest import GeometryEntry
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


def geometry_entry(**changes) -> GeometryEntry:
    """The geometry of a bundle of nothing real, with some fields changed."""
    base = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "vocab_size": 100,
        "context_length": 512,
        "positions": "sequential",
        "grid": (3, 3),
        "tokens_per_tile": None,
        "typical_tiles": 1,
        "typical_tokens": 9,
        "tokens_per_image": 9,
        "vision_hidden_size": 8,
        "vision_intermediate_size": 16,
        "vision_mlp_matrices": 2,
        "vision_layers": 1,
        "vision_class_tokens": 1,
        "vision_window": 0,
        "vision_global_layers": (),
        "vision_tokens": (10,),
        "patches_per_token": 1,
        "projector_sizes": (8, 8, 8),
    }
    return GeometryEntry(**base | changes)
