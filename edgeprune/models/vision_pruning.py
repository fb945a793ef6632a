"""Vision transformers with an opening between a layer's attention and its MLP, where methods drop patch tokens."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class TowerAttention(NamedTuple):
    """What a tower's attention block leaves.

    Shapes:
        hidden: [B, S, C]; query, key, value: [B, H, S, D].
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class TowerTokens(NamedTuple):
    """The tokens of the vision tower at some depth.

    Shapes:
        hidden: [M, 1 + K, C], the class token first.
        slots: [M, K] int64, each patch token's position in the original grid, row-major; of a merged token, that of
            the token the others were merged into.
        sizes: [M, 1 + K] float32, how many tokens each one stands for; None while none is merged.
    """

    hidden: Tensor
    slots: Tensor
    sizes: Tensor | None = None


class VisionPruner(Protocol):
    """What a method that prunes inside the vision tower offers."""

    def keep_after_attention(self, layer: int) -> int | None:
        """Patch tokens that are left between this layer's attention and its MLP; None = no site here."""

    def prune(self, layer: int, history: Sequence[TowerAttention], tokens: TowerTokens) -> TowerTokens:
        """Drop or merge patch tokens; ``keep_after_attention(layer)`` of them are left.

        Args:
            layer: The layer.
            history: The attention blocks run since the last site, this layer's last; equal numbers of tokens.
            tokens: The tokens after this layer's attention.
        """


def keep_patches(tokens: TowerTokens, keep: Tensor) -> TowerTokens:
    """The class token and some patch tokens, [M, K] int64 counted without the class token.

    Where several patches become one visual token, they stand together and are kept together: ``keep`` counts tokens.
    """
    num_tiles, num_rows, width = tokens.hidden.shape
    together = (num_rows - 1) // tokens.slots.shape[1]
    groups = tokens.hidden[:, 1:].reshape(num_tiles, tokens.slots.shape[1], together * width)
    kept = groups.gather(1, keep.unsqueeze(-1).expand(-1, -1, together * width))
    patches = kept.reshape(num_tiles, keep.shape[1] * together, width)
    return TowerTokens(torch.cat((tokens.hidden[:, :1], patches), dim=1), tokens.slots.gather(1, keep))


class TowerLayer(Protocol):
    """A layer of a vision transformer, as two blocks."""

    def attention(self, hidden: Tensor, *, sizes: Tensor | None = None) -> TowerAttention:
        """Norm, attention and residual: [B, S, C] → [B, S, C] with the attention's inputs.

        Args:
            hidden: [B, S, C].
            sizes: See :func:`attend`.
        """

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Norm, MLP and residual: [B, S, C] → [B, S, C]."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, sizes: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention, heads merged.

    Shapes:
        query, key, value: [B, H, S, D]; returns [B, S, H·D].

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        causal: Whether a row sees only rows up to itself.
        sizes: [B, S] float32, how many tokens each row stands for; it is attended to as often.
    """
    batch, heads, length, width = query.shape
    often = None
    if sizes is not None:
        # A row for every query: ONNX Runtime's Attention does not broadcast its mask.
        often = sizes.log().to(query.dtype)[:, None, None, :].expand(-1, -1, length, -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=often, is_causal=causal)
    return mixed.transpose(1, 2).reshape(batch, length, heads * width)


def run_tower_layers(
    layers: Iterable[TowerLayer], tokens: TowerTokens, pruner: VisionPruner | None
) -> tuple[TowerTokens, TowerAttention | None]:
    """Run a tower's layers, first to last, with pruning between their blocks.

    Args:
        layers: The layers that run.
        tokens: The embedded tokens.
        pruner: A method that drops patch tokens.

    Returns:
        The tokens that are left, and the attention block of the last layer; None if none ran.
    """
    history: list[TowerAttention] = []
    attention: TowerAttention | None = None
    for index, layer in enumerate(layers):
        attention = layer.attention(tokens.hidden, sizes=tokens.sizes)
        tokens = tokens._replace(hidden=attention.hidden)
        history.append(attention)
        if pruner is not None and pruner.keep_after_attention(index) is not None:
            tokens = pruner.prune(index, history, tokens)
            history = []
        tokens = tokens._replace(hidden=layer.feed_forward(tokens.hidden))
    return tokens, attention
