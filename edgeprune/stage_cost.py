"""What every stage of a prompt and of a generated token costs: operations, weights read, values moved.

Counted at the numbers of tokens that are really there, so a prompt whose kept tokens depend on the picture has costs
of its own. Floating-point operations are those of :attr:`edgeprune.cost.Convention.TRUE`. Memory is counted from below:
every weight is read once, cached keys and values are read once and new ones written once, and a block (attention, MLP)
reads its input and writes its output once. Biases, norms and the scoring at a site are left out.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from edgeprune.cost import (
    Convention,
    DecoderShape,
    LayerRows,
    VisionShape,
    attention_flops,
    head_flops,
    layer_rows,
    mlp_flops,
    projector_flops,
    vision_flops,
)
from edgeprune.manifest import GeometryEntry, Manifest

VISION, PROJECTOR, EMBED, DECODE = "vision", "projector", "embed", "decode"


@dataclass(frozen=True)
class StageCost:
    """Cost of one run of one stage.

    Attributes:
        flops: Floating-point operations, two per multiply-add.
        weights: Weights read.
        values: Other values read or written: activations between blocks, cached keys and values.
    """

    flops: int
    weights: int
    values: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"stage cost: '{field.name}' is {getattr(self, field.name)}, below 0")

    def bytes(self, bytes_per_weight: float, bytes_per_value: float) -> float:
        """What crosses the memory bus."""
        return self.weights * bytes_per_weight + self.values * bytes_per_value


@dataclass(frozen=True)
class PromptCounts:
    """The rows of one prompt on its way through the model.

    Attributes:
        tiles: Visual tokens of every tile (of every picture, where pictures keep their size) before pruning.
        entering: Visual tokens that enter the decoder.
        kept: Visual tokens that leave every site.
        text: Rows of text; they are never dropped.
    """

    tiles: tuple[int, ...]
    entering: int
    kept: tuple[int, ...]
    text: int

    def layer_rows(self, manifest: Manifest) -> tuple[LayerRows, ...]:
        """The rows of every decoder layer during prefill; without pictures the sites are skipped."""
        sites = manifest.sites if self.kept else ()
        return layer_rows(sites, manifest.geometry.num_layers, self.entering, self.kept, self.text)


def prompt_costs(manifest: Manifest, counts: PromptCounts) -> dict[str, StageCost]:
    """The stages up to the first token, by the name that timings have for them.

    Raises:
        ValueError: The counts do not fit the manifest.
    """
    geometry = manifest.geometry
    shape = DecoderShape.from_geometry(geometry)
    rows = counts.layer_rows(manifest)
    added = manifest.deepstack_layers
    costs: dict[str, StageCost] = {}
    if counts.tiles:
        costs[VISION] = _vision(geometry, counts.tiles)
        sizes = geometry.projector_sizes
        costs[PROJECTOR] = StageCost(
            (1 + added) * projector_flops(sizes, counts.entering),
            (1 + added) * sum(a * b for a, b in itertools.pairwise(sizes)),
            (1 + added) * counts.entering * (sizes[0] + sizes[-1]),
        )
    entering = counts.entering + counts.text
    costs[EMBED] = StageCost(0, counts.text * shape.hidden_size, (1 + added) * entering * shape.hidden_size)
    for index, segment in enumerate(manifest.segments):
        last = index == len(manifest.segments) - 1
        costs[f"prefill.{segment.graph}"] = _blocks(
            shape,
            [rows[layer].attention for layer in segment.layers],
            [rows[layer].mlp for layer in segment.mlp_layers],
            [0] * len(segment.layers),
            added=sum(rows[layer].mlp for layer in segment.mlp_layers if layer < added),
            head=last,
        )
    return costs


def decode_cost(manifest: Manifest, cached_rows: Sequence[int]) -> StageCost:
    """One generated token.

    Args:
        manifest: The bundle's.
        cached_rows: Rows in the KV cache of every layer before the step.
    """
    shape = DecoderShape.from_geometry(manifest.geometry)
    if len(cached_rows) != shape.num_layers:
        raise ValueError(f"rows of {len(cached_rows)} layers for a decoder of {shape.num_layers}")
    ones = [1] * shape.num_layers
    blocks = _blocks(shape, ones, ones, cached_rows, added=manifest.deepstack_layers, head=True)
    # The embedding of one token is one row of its table.
    return replace(blocks, weights=blocks.weights + shape.hidden_size)


def _vision(geometry: GeometryEntry, tiles: Sequence[int]) -> StageCost:
    flops = values = 0
    for tokens in tiles:
        shape = VisionShape.from_geometry(_tile(geometry, tokens))
        flops += vision_flops(shape)
        values += 2 * shape.hidden_size * sum(rows.attention + rows.mlp for rows in shape.rows)
    width, inner = geometry.vision_hidden_size, geometry.vision_intermediate_size
    layer = 4 * width * width + geometry.vision_mlp_matrices * width * inner
    return StageCost(flops, geometry.vision_layers * layer, values)


def _tile(geometry: GeometryEntry, tokens: int) -> GeometryEntry:
    """The geometry with tiles of ``tokens`` visual tokens; what the tower keeps of them is scaled alike."""
    classes = geometry.vision_class_tokens
    kept = tuple(
        classes + round((rows - classes) * tokens / geometry.num_patches) for rows in geometry.vision_tokens
    )
    return replace(geometry, grid=(1, tokens), vision_tokens=kept)


def _blocks(
    shape: DecoderShape,
    attention_rows: Sequence[int],
    mlp_rows: Sequence[int],
    cached_rows: Sequence[int],
    *,
    added: int,
    head: bool,
) -> StageCost:
    """Attention and MLP blocks with their rows, rows of features that DeepStack adds, and the head over one row."""
    d, true = shape.hidden_size, Convention.TRUE
    flops = sum(
        attention_flops(shape, rows, true, cached_rows=cached)
        for rows, cached in zip(attention_rows, cached_rows, strict=True)
    ) + sum(mlp_flops(shape, rows, true) for rows in mlp_rows)
    weights = (
        len(attention_rows) * 2 * d * (shape.query_width + shape.kv_width)
        + len(mlp_rows) * 3 * d * shape.intermediate_size
    )
    cache = 2 * shape.kv_width * (sum(attention_rows) + sum(cached_rows))
    values = d * (2 * sum(attention_rows) + 2 * sum(mlp_rows) + added) + cache
    if head:
        flops, weights, values = (
            flops + head_flops(shape),
            weights + d * shape.vocab_size,
            values + d + shape.vocab_size,
        )
    return StageCost(flops, weights, values)
