"""What fits which Jetson Orin: edgeprune's estimate of memory for models of known sizes, without their weights.

    python benchmarks/jetson_memory.py

Prints the Markdown table of docs/jetson.md. Sizes are those of the models' config.json. INT8 and INT4 (blocks of 128)
hold the decoder's products and the head; embedding, tower and projector stay float16. Nothing is built or executed.
"""

from dataclasses import dataclass
from types import SimpleNamespace

from edgeprune.manifest import GeometryEntry
from edgeprune.runtimes.engine_memory import MemoryEstimate, MemoryModel
from edgeprune.runtimes.engine_profiles import Limits
from edgeprune.targets import GIB, TARGETS

SEQUENCE = 2048
BYTES_PER_WEIGHT = {"float16": 2.0, "INT8": 1.0 + 2 / 1536, "INT4": 0.5 + 2 / 128}


@dataclass(frozen=True)
class Model:
    """A model's sizes; of its picture, the tiles and the visual tokens of each; layers behind which DeepStack adds."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: tuple[int, int, int]
    vocabulary: int
    tower: tuple[int, int, int, int]
    tokens: int
    tiles: int
    patches_per_token: int
    projector: tuple[int, ...]
    deepstack: int = 0

    def quantized_weights(self) -> int:
        """Values in the decoder's products and the head."""
        queries, keys, width = self.heads
        attention = self.hidden * (queries + 2 * keys) * width + queries * width * self.hidden
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden

    def other_weights(self) -> int:
        """Values in embedding, tower and projector."""
        layers, width, inner, matrices = self.tower
        projector = sum(a * b for a, b in zip(self.projector, self.projector[1:], strict=False))
        tower = layers * (4 * width**2 + matrices * width * inner)
        return self.vocabulary * self.hidden + tower + (1 + self.deepstack) * projector

    def estimate(self, precision: str) -> MemoryEstimate:
        """Memory for one picture and SEQUENCE rows."""
        layers, width, inner, matrices = self.tower
        geometry = GeometryEntry(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_layers=self.layers,
            num_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.heads[2],
            vocab_size=self.vocabulary,
            context_length=2 * SEQUENCE,
            positions="sequential",
            grid=(self.tokens, 1),
            tokens_per_tile=None,
            typical_tiles=self.tiles,
            typical_tokens=self.tokens * self.tiles,
            tokens_per_image=self.tokens * self.tiles,
            vision_hidden_size=width,
            vision_intermediate_size=inner,
            vision_mlp_matrices=matrices,
            vision_layers=layers,
            vision_class_tokens=1,
            vision_window=0,
            vision_global_layers=(),
            vision_tokens=(self.tokens * self.patches_per_token + 1,) * layers,
            patches_per_token=self.patches_per_token,
            projector_sizes=self.projector,
        )
        weights = int(self.quantized_weights() * BYTES_PER_WEIGHT[precision] + self.other_weights() * 2)
        # All that the estimate reads of a manifest.
        manifest = SimpleNamespace(geometry=geometry, deepstack_layers=self.deepstack)
        return MemoryModel(manifest, {"all": weights}, {}, Limits(1, SEQUENCE), 2).estimate()


MODELS = (
    Model(
        "InternVL3-1B", 24, 896, 4864, (14, 2, 64), 151674, (24, 1024, 4096, 2), 256, 7, 4, (4096, 896, 896)
    ),
    Model(
        "Qwen2-VL-2B",
        28,
        1536,
        8960,
        (12, 2, 128),
        151936,
        (32, 1280, 5120, 2),
        256,
        1,
        4,
        (5120, 5120, 1536),
    ),
    Model(
        "Qwen2.5-VL-3B",
        36,
        2048,
        11008,
        (16, 2, 128),
        151936,
        (32, 1280, 3420, 3),
        256,
        1,
        4,
        (5120, 5120, 2048),
    ),
    Model(
        "Qwen3-VL-2B",
        28,
        2048,
        6144,
        (16, 8, 128),
        151936,
        (24, 1024, 4096, 2),
        256,
        1,
        4,
        (4096, 4096, 2048),
        deepstack=3,
    ),
    Model(
        "Qwen3-VL-4B",
        36,
        2560,
        9728,
        (32, 8, 128),
        151936,
        (24, 1024, 4096, 2),
        256,
        1,
        4,
        (4096, 4096, 2560),
        deepstack=3,
    ),
    Model(
        "LLaVA-1.5-7B",
        32,
        4096,
        11008,
        (32, 32, 128),
        32064,
        (23, 1024, 4096, 2),
        576,
        1,
        1,
        (1024, 4096, 4096),
    ),
)


def rows() -> list[str]:
    """The table's lines."""
    lines = [
        f"| model | decoder | weights | KV cache, {SEQUENCE} rows | in all | fits from |",
        "|---|---|---|---|---|---|",
    ]
    boards = [target for name, target in TARGETS.items() if "orin" in name]
    for model in MODELS:
        for precision in BYTES_PER_WEIGHT:
            need = model.estimate(precision)
            smallest = next(board for board in boards if need.run <= board.usable_bytes)
            sizes = (need.weights, need.kv_cache, need.run)
            cells = [f"{size / GIB:.1f} GiB" for size in sizes]
            lines.append("| " + " | ".join([model.name, precision, *cells, f"`{smallest.name}`"]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
