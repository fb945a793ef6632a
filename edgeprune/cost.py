"""What a model costs on paper: operations, KV cache, weights and activations, with tokens dropped on the way.

Two conventions are in use for a decoder layer over n rows, width d and MLP width m. They differ by more than
a factor of two, so a number means nothing without its convention:

* :attr:`Convention.PAPER`, 4nd² + 2n²d + 2ndm: multiply-adds, with an MLP of two matrices and as many
  key/value heads as query heads (ATP-LLaVA Eq. 15, after FastV). The numbers printed there fit twice that.
* :attr:`Convention.TRUE`, 2·(4nd² + 2n²d + 3ndm): floating-point operations of a Llama layer, two per
  multiply-add, with the three matrices of the gated MLP. It reproduces IVTP Table 9. Grouped-query heads and
  a head width other than d/H are counted as they are: 4d² becomes 2d·(H + Hkv)·D, and 2n²d becomes 2n²·H·D.

Both count the full n × n attention matrix; a causal kernel may compute half of it. Norms, softmax, rotary
embeddings and activation functions are not counted, nor is the scoring at a pruning site, which reads few
rows.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from edgeprune.manifest import GeometryEntry


class Convention(enum.Enum):
    """How a decoder layer is counted."""

    PAPER = "paper"
    """Multiply-adds, 4nd² + 2n²d + 2ndm per layer, no head (ATP-LLaVA Eq. 15)."""

    TRUE = "true"
    """Floating-point operations, 2·(4nd² + 2n²d + 3ndm) per layer, plus the head."""


class PruningPoint(Protocol):
    """A place between two blocks of the decoder where rows are dropped; manifest sites are such places."""

    @property
    def layer(self) -> int:
        """0-based layer."""

    @property
    def before_mlp(self) -> bool:
        """Between the layer's attention and its MLP instead of before the layer."""


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder.

    Attributes:
        hidden_size: d.
        intermediate_size: m.
        num_layers: Layers.
        num_heads: H, query heads.
        num_kv_heads: Hkv; divides ``num_heads``.
        head_dim: D.
        vocab_size: V.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"decoder: '{field.name}' is {getattr(self, field.name)}, not at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"decoder: {self.num_heads} heads cannot share {self.num_kv_heads} key/value heads"
            )

    @classmethod
    def from_geometry(cls, geometry: GeometryEntry) -> "DecoderShape":
        """The decoder of a bundle."""
        return cls(**{field.name: getattr(geometry, field.name) for field in fields(cls)})

    @property
    def query_width(self) -> int:
        """H·D."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Hkv·D."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class LayerRows:
    """Rows of a sequence that pass through the two blocks of one layer.

    Attributes:
        attention: Rows of the attention block; these are also cached.
        mlp: Rows of the MLP block; fewer if tokens are dropped between the two.
    """

    attention: int
    mlp: int

    def __post_init__(self) -> None:
        if not 0 <= self.mlp <= self.attention:
            raise ValueError(f"a layer with {self.attention} rows in its attention has {self.mlp} in its MLP")


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower and the rows of one tile in it.

    Attributes:
        hidden_size: Width.
        intermediate_size: Width of its MLP.
        rows: Rows of each layer that runs, class token included.
        mlp_matrices: Matrices of the MLP: 2, or 3 where it is gated.
        spans: Rows that a row attends to, by layer; empty = all of its tile.
    """

    hidden_size: int
    intermediate_size: int
    rows: tuple[LayerRows, ...]
    mlp_matrices: int = 2
    spans: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.intermediate_size < 1:
            raise ValueError(
                f"vision tower: widths {self.hidden_size} and {self.intermediate_size}, not at least 1"
            )
        for before, after in itertools.pairwise(self.rows):
            if after.attention > before.mlp:
                raise ValueError(
                    f"vision tower: {before.mlp} rows leave a layer and {after.attention} enter the next"
                )

    @classmethod
    def from_geometry(cls, geometry: GeometryEntry) -> "VisionShape":
        """The tower of a bundle, pruned as it is there.

        ``vision_tokens`` are the rows after each layer's attention; the next layer's attention sees the same.
        """
        if len(geometry.vision_tokens) != geometry.vision_layers:
            raise ValueError(
                f"vision tower: {len(geometry.vision_tokens)} row counts for {geometry.vision_layers} layers"
            )
        entering = (_tile_rows(geometry), *geometry.vision_tokens[:-1])
        rows = tuple(LayerRows(a, b) for a, b in zip(entering, geometry.vision_tokens, strict=False))
        return cls._of(geometry, rows)

    @classmethod
    def unpruned(cls, geometry: GeometryEntry) -> "VisionShape":
        """The tower of a bundle with all tokens in every layer."""
        tokens = _tile_rows(geometry)
        return cls._of(geometry, (LayerRows(tokens, tokens),) * geometry.vision_layers)

    @classmethod
    def _of(cls, geometry: GeometryEntry, rows: tuple[LayerRows, ...]) -> "VisionShape":
        spans = [
            layer.attention
            if not geometry.vision_window or index in geometry.vision_global_layers
            else min(geometry.vision_window, layer.attention)
            for index, layer in enumerate(rows)
        ]
        return cls(
            geometry.vision_hidden_size,
            geometry.vision_intermediate_size,
            rows,
            geometry.vision_mlp_matrices,
            tuple(spans),
        )


def _tile_rows(geometry: GeometryEntry) -> int:
    """Rows of a tile that enter the tower."""
    return geometry.num_patches * geometry.patches_per_token + geometry.vision_class_tokens


def layer_rows(
    points: Sequence[PruningPoint], num_layers: int, tokens_in: int, kept: Sequence[int], text: int
) -> tuple[LayerRows, ...]:
    """The rows of every decoder layer during prefill.

    Args:
        points: Where visual tokens are dropped, in the order of the decoder.
        num_layers: Decoder layers.
        tokens_in: Visual tokens that enter the decoder.
        kept: Visual tokens that leave each of ``points``.
        text: Rows of text, before and after the picture; they are never dropped.

    Raises:
        ValueError: The points are out of order or out of range, or tokens come back.
    """
    if len(points) != len(kept):
        raise ValueError(f"{len(kept)} token counts for {len(points)} pruning points: give one for each")
    places = [(point.layer, point.before_mlp) for point in points]
    if any(not earlier < later for earlier, later in itertools.pairwise(places)):
        raise ValueError("pruning points out of order: list them as the decoder meets them, each once")
    if any(not 0 <= layer < num_layers for layer, _ in places):
        raise ValueError(f"a pruning point lies outside the decoder's {num_layers} layers")
    counts = (tokens_in, *kept)
    if text < 0 or min(counts) < 0 or any(now > before for before, now in zip(counts, kept, strict=False)):
        raise ValueError(f"visual tokens {list(counts)}: expected counts that do not rise, none below 0")
    after = dict(zip(places, kept, strict=True))
    rows: list[LayerRows] = []
    visual = tokens_in
    for layer in range(num_layers):
        visual = after.get((layer, False), visual)
        attention = visual + text
        visual = after.get((layer, True), visual)
        rows.append(LayerRows(attention, visual + text))
    return tuple(rows)


def average_visual_tokens(
    points: Sequence[PruningPoint], num_layers: int, tokens_in: int, kept: Sequence[int]
) -> float:
    """Visual tokens that enter a layer, averaged over the layers.

    The "average token count" of ATP-LLaVA (§4.2: "an average value across all decoder layers"), which is also
    the mean number of visual tokens in a layer's KV cache. Arguments as in :func:`layer_rows`.
    """
    rows = layer_rows(points, num_layers, tokens_in, kept, text=0)
    return sum(row.attention for row in rows) / num_layers


def attention_flops(shape: DecoderShape, rows: int, convention: Convention, *, cached_rows: int = 0) -> int:
    """One attention block over ``rows`` new rows that see themselves and ``cached_rows`` more.

    PAPER: 4nd² + 2n(n + p)d. TRUE: 2·(2nd·(H + Hkv)·D + 2n(n + p)·H·D).
    """
    seen = rows + cached_rows
    if convention is Convention.PAPER:
        return 4 * rows * shape.hidden_size**2 + 2 * rows * seen * shape.hidden_size
    projections = 2 * rows * shape.hidden_size * (shape.query_width + shape.kv_width)
    return 2 * (projections + 2 * rows * seen * shape.query_width)


def mlp_flops(shape: DecoderShape, rows: int, convention: Convention) -> int:
    """One MLP block over ``rows`` rows. PAPER: 2ndm. TRUE: 2·3ndm."""
    product = rows * shape.hidden_size * shape.intermediate_size
    return 2 * product if convention is Convention.PAPER else 6 * product


def head_flops(shape: DecoderShape, rows: int = 1) -> int:
    """The head over ``rows`` rows: 2ndV."""
    return 2 * rows * shape.hidden_size * shape.vocab_size


def decoder_prefill_flops(
    shape: DecoderShape,
    rows_by_layer: Sequence[LayerRows],
    convention: Convention = Convention.TRUE,
    *,
    head_on_all_rows: bool = False,
) -> int:
    """The decoder over a whole prompt.

    Args:
        shape: The decoder.
        rows_by_layer: Rows of every layer, see :func:`layer_rows`.
        convention: How a layer is counted; with PAPER the head is left out, as in Eq. 15.
        head_on_all_rows: Count the head on every row that leaves the last layer, as IVTP does; the runtime
            computes it on the last row only.
    """
    _check_layers(shape, rows_by_layer)
    total = sum(
        attention_flops(shape, rows.attention, convention) + mlp_flops(shape, rows.mlp, convention)
        for rows in rows_by_layer
    )
    if convention is Convention.PAPER:
        return total
    return total + head_flops(shape, rows_by_layer[-1].mlp if head_on_all_rows else 1)


def decode_step_flops(
    shape: DecoderShape, cached_rows: Sequence[int], convention: Convention = Convention.TRUE
) -> int:
    """One generated token: a single row that sees each layer's cache and itself, and the head (TRUE only).

    Args:
        shape: The decoder.
        cached_rows: Rows in the KV cache of every layer before the step.
        convention: How a layer is counted.
    """
    _check_layers(shape, cached_rows)
    total = sum(
        attention_flops(shape, 1, convention, cached_rows=cached) + mlp_flops(shape, 1, convention)
        for cached in cached_rows
    )
    return total if convention is Convention.PAPER else total + head_flops(shape)


def vision_flops(shape: VisionShape, tiles: int = 1) -> int:
    """The vision tower: 2·(4nd² + 2nsd + kndm) per layer and tile, s rows attended to, k matrices in the MLP.

    The patch embedding is left out (under 0.2 % of CLIP ViT-L/336). Source: IVTP Table 9, column ViT (s = n, k = 2).
    """
    d, m = shape.hidden_size, shape.intermediate_size
    spans = shape.spans or tuple(rows.attention for rows in shape.rows)
    per_tile = sum(
        2 * (rows.attention * (4 * d * d + 2 * span * d) + shape.mlp_matrices * rows.mlp * d * m)
        for rows, span in zip(shape.rows, spans, strict=True)
    )
    return tiles * per_tile


def projector_flops(sizes: Sequence[int], tokens: int) -> int:
    """A projector of linear layers over ``tokens`` visual tokens: 2n·Σ of the products of neighbouring ``sizes``.

    LLaVA-1.5's has the sizes Cv, d, d.
    """
    return 2 * tokens * sum(a * b for a, b in itertools.pairwise(sizes))


def kv_cache_bytes(shape: DecoderShape, cached_rows: Sequence[int], bytes_per_value: int = 2) -> int:
    """The KV cache: 2·Hkv·D values per row and layer.

    Args:
        shape: The decoder.
        cached_rows: Rows in the cache of every layer.
        bytes_per_value: 2 for float16, 4 for float32.
    """
    _check_layers(shape, cached_rows)
    return 2 * shape.kv_width * bytes_per_value * sum(cached_rows)


def weight_bytes(shape: DecoderShape, bytes_per_value: int = 2, *, tied_embeddings: bool = False) -> int:
    """The decoder's weights: 2d·(H + Hkv)·D + 3dm + 2d per layer, V·d for embedding and head each, and d.

    Biases are left out; Llama has none.
    """
    d = shape.hidden_size
    layer = 2 * d * (shape.query_width + shape.kv_width) + 3 * d * shape.intermediate_size + 2 * d
    embeddings = (1 if tied_embeddings else 2) * shape.vocab_size * d
    return bytes_per_value * (shape.num_layers * layer + embeddings + d)


def peak_activation_bytes(
    shape: DecoderShape,
    rows_by_layer: Sequence[LayerRows],
    bytes_per_value: int = 2,
    *,
    fused_attention: bool = True,
) -> int:
    """The most that the activations of one block hold at a time during prefill, KV cache not counted.

    Attention: residual, normed rows, queries, keys, values and mixed values, n·(2d + 2·H·D + 2·Hkv·D), plus
    the probabilities H·n² where attention is not fused. MLP: residual, normed rows, gate and up, n·(2d + 2m).
    A runtime whose arena does not reuse memory holds more.
    """
    _check_layers(shape, rows_by_layer)
    attention_width = 2 * (shape.hidden_size + shape.query_width + shape.kv_width)
    mlp_width = 2 * (shape.hidden_size + shape.intermediate_size)
    peak = 0
    for rows in rows_by_layer:
        scores = 0 if fused_attention else shape.num_heads * rows.attention**2
        peak = max(peak, rows.attention * attention_width + scores, rows.mlp * mlp_width)
    return peak * bytes_per_value


def _check_layers(shape: DecoderShape, per_layer: Sequence[object]) -> None:
    if len(per_layer) != shape.num_layers:
        raise ValueError(f"rows of {len(per_layer)} layers for a decoder of {shape.num_layers}")
