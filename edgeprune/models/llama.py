"""Decoders of Llama's shape (Vicuna, Mistral, Qwen2, Qwen3): as torch references, in half-layers to prune between.

A decoder layer is two blocks, ``attention`` (norm, self-attention, residual) and ``mlp`` (norm, gated MLP, residual).
A pruning site lies before a layer's attention or between its attention and its MLP; :class:`Cut` names such a place.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.errors import CheckpointError, PruningError
from edgeprune.models.config_fields import read_field, require_choice

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")

# What Hugging Face's configurations assume where config.json leaves it out, if not what LlamaConfig does.
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "qwen2": {
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
}

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LlamaConfig:
    """Geometry of the decoder.

    Attributes:
        hidden_size: C.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: Key/value heads; divides ``num_heads``.
        head_dim: D.
        intermediate_size: Width of the gated MLP.
        vocab_size: V.
        context_length: Largest position plus one.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary embedding.
        rope_factor: Linear scaling: positions are divided by it.
        attention_bias: Whether q/k/v projections have a bias.
        output_bias: Whether the o projection has one.
        mlp_bias: Whether the MLP projections have a bias.
        tie_word_embeddings: Whether the head uses the embedding matrix.
        mrope_section: How many frequencies turn with each of several position ids of a row (M-RoPE, Qwen2-VL);
            empty = a row has one.
        mrope_interleaved: Whether they take turns (time, row, column, time …) until a section is used up, and time has
            the rest (Qwen3-VL), instead of lying one section behind the other.
        head_norms: Whether an RMS norm of each query and key head runs before the rotary embedding (Qwen3).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    head_norms: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"text_config: '{name}' is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"text_config: {self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"text_config: the head width {self.head_dim} is odd: the rotary embedding turns pairs, so "
                "'head_dim' must be even"
            )
        if self.mrope_section and sum(self.mrope_section) != self.head_dim // 2:
            raise CheckpointError(
                f"text_config: 'mrope_section' {list(self.mrope_section)} does not add up to half of the "
                f"head width {self.head_dim}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, tie_word_embeddings: bool) -> "LlamaConfig":
        """Read the ``text_config`` section of a checkpoint.

        Raises:
            CheckpointError: A field is missing or a variant is not supported.
        """
        model_type = require_choice(config, "model_type", MODEL_TYPES, "llama")
        config = {**_DEFAULTS.get(model_type, {}), **config}
        qwen2 = model_type.startswith("qwen2")
        require_choice(config, "hidden_act", ("silu",), "silu")
        _refuse_sliding_window(config, model_type)
        hidden_size = read_field(config, "hidden_size", int, 4096)
        num_heads = read_field(config, "num_attention_heads", int, 32)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = str(rope.get("rope_type", rope.get("type", "default")))
        # Before transformers 5, "mrope" stood for the default with several position ids.
        rope_type = "default" if rope_type == "mrope" else rope_type
        # "dynamic" differs from "default" behind max_position_embeddings only, and no prompt goes there.
        if rope_type not in ("default", "linear", "dynamic"):
            raise CheckpointError(
                f"text_config: rope_type '{rope_type}' is not supported (default, linear, dynamic are)"
            )
        theta = rope.get("rope_theta", config.get("rope_theta"))
        return cls(
            hidden_size=hidden_size,
            num_layers=read_field(config, "num_hidden_layers", int, 32),
            num_heads=num_heads,
            num_kv_heads=read_field(config, "num_key_value_heads", int, num_heads),
            head_dim=read_field(config, "head_dim", int, hidden_size // num_heads),
            intermediate_size=read_field(config, "intermediate_size", int, 11008),
            vocab_size=read_field(config, "vocab_size", int, 32000),
            context_length=read_field(config, "max_position_embeddings", int, 2048),
            rms_norm_eps=read_field(config, "rms_norm_eps", float, 1e-6),
            rope_theta=10000.0 if theta is None else float(theta),
            rope_factor=float(rope.get("factor", 1.0)) if rope_type == "linear" else 1.0,
            attention_bias=qwen2 or read_field(config, "attention_bias", bool, False),
            output_bias=not qwen2 and read_field(config, "attention_bias", bool, False),
            mlp_bias=read_field(config, "mlp_bias", bool, False),
            tie_word_embeddings=tie_word_embeddings,
            mrope_section=tuple(int(size) for size in rope.get("mrope_section") or ()),
            mrope_interleaved=model_type == "qwen3_vl_text",
            head_norms=model_type.startswith("qwen3"),
        )


def _refuse_sliding_window(config: Mapping[str, Any], model_type: str) -> None:
    """Mistral's and Qwen's attention may be cut to a window; the checkpoints of our families do not ask for it."""
    windowed = model_type == "mistral" or bool(config.get("use_sliding_window", False))
    # What their configurations assume where the field is missing.
    window = config.get("sliding_window", None if model_type == "llama" else 4096)
    if windowed and window is not None:
        raise CheckpointError(
            f"text_config: 'sliding_window' is {window}, supported: null (attention to all rows)"
        )


@dataclass(frozen=True, order=True)
class Cut:
    """A place between two blocks of the decoder: before a layer's attention, or before its MLP.

    Attributes:
        layer: 0-based layer.
        before_mlp: ``False`` = before the layer's attention, ``True`` = after it and before the MLP.
    """

    layer: int
    before_mlp: bool = False

    @property
    def description(self) -> str:
        """The place in words, as reports print it."""
        return f"before the MLP of layer {self.layer}" if self.before_mlp else f"before layer {self.layer}"


class RotaryAngles(NamedTuple):
    """Cosines and sines of the rotary embedding, [B, S, D/2] each.

    ``fused`` emits ONNX's RotaryEmbedding (opset 23) when traced, instead of its decomposition.
    """

    cos: Tensor
    sin: Tensor
    fused: bool


class AttentionOutput(NamedTuple):
    """What the attention block leaves.

    Shapes:
        hidden: [B, S, C], residual added.
        query: [B, H, S, D], after the rotary embedding.
        key, value: [B, Hkv, P + S, D], cache included; keys after the rotary embedding.
        probe_query: [B, H, R, D] or None.
        probe_key: [B, Hkv, R, D] or None.
    """

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    probe_query: Tensor | None
    probe_key: Tensor | None


class Probe(NamedTuple):
    """Rows that ride along in an attention block's query and key projections only.

    IVTP's pseudo-CLS token is one: it scores the others but never enters hidden states or the KV cache.

    Shapes:
        weights: [R, S], each probe row is a weighted sum of the hidden states that enter the layer.
        offset: [R, C], added to it.
        angles: rotary angles of the probe rows, [1, R, D/2].
    """

    weights: Tensor
    offset: Tensor
    angles: RotaryAngles


def apply_rotary(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Rotate the two halves of each head (the Hugging Face layout).

    Shapes:
        x: [B, H, S, D] → [B, H, S, D].
    """
    if angles.fused:
        rotated: Tensor = torch.onnx.ops.rotary_embedding(x, angles.cos, angles.sin)
        return rotated
    cos, sin = angles.cos.unsqueeze(1), angles.sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def causal_mask(query_length: int, past_length: int, device: torch.device) -> Tensor:
    """Boolean mask [1, 1, S, P + S]: row i sees the cache and rows up to i."""
    rows = torch.arange(query_length, device=device).unsqueeze(1) + past_length
    columns = torch.arange(query_length + past_length, device=device).unsqueeze(0)
    return (columns <= rows).unsqueeze(0).unsqueeze(0)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention with grouped-query heads.

    Shapes:
        query: [B, H, S, D]; key, value: [B, Hkv, P + S, D]; mask: broadcast to [B, 1, S, P + S], True = visible.
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


class LlamaAttention(nn.Module):
    """Self-attention projections; parameter names follow Hugging Face."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, width, bias=config.output_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.head_norms else nn.Identity()
            for _ in range(2)
        )

    def queries(self, x: Tensor) -> Tensor:
        """Query heads before the rotary embedding: [B, S, C], normed → [B, H, S, D]."""
        heads: Tensor = self.q_norm(self.split_heads(self.q_proj(x), self.num_heads))
        return heads

    def keys(self, x: Tensor) -> Tensor:
        """Key heads before the rotary embedding: [B, S, C], normed → [B, Hkv, S, D]."""
        heads: Tensor = self.k_norm(self.split_heads(self.k_proj(x), self.num_kv_heads))
        return heads

    def split_heads(self, x: Tensor, num_heads: int) -> Tensor:
        """[B, S, H·D] → [B, H, S, D]."""
        batch, length, _ = x.shape
        return x.view(batch, length, num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """[B, H, S, D] → [B, S, H·D]."""
        batch, heads, length, width = x.shape
        return x.transpose(1, 2).reshape(batch, length, heads * width)


class LlamaMlp(nn.Module):
    """The gated MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, C] → [B, S, C]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaLayer(nn.Module):
    """One decoder layer, as two blocks."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMlp(config)

    def attention(
        self,
        hidden: Tensor,
        angles: RotaryAngles,
        mask: Tensor,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        probe: Probe | None = None,
        attend: AttentionFunction = fused_attention,
    ) -> AttentionOutput:
        """Run the attention block.

        Shapes:
            hidden: [B, S, C]; mask: see :func:`fused_attention`; past_key, past_value: [B, Hkv, P, D].

        Args:
            hidden: Hidden states entering the layer.
            angles: Rotary angles of the rows.
            mask: Attention mask, passed to ``attend``.
            past_key: Cached keys of earlier tokens.
            past_value: Cached values of earlier tokens.
            probe: Rows that need a query and a key from this layer without being part of the sequence.
            attend: The attention arithmetic; training forms of pruning methods replace it.
        """
        attn = self.self_attn
        length = hidden.shape[1]
        normed = self.input_layernorm(hidden)
        # Probe rows join the same projections, so that their weights are read once.
        rows = normed
        if probe is not None:
            probe_hidden = (probe.weights.to(hidden.dtype) @ hidden) + probe.offset.to(hidden.dtype)
            rows = torch.cat((normed, self.input_layernorm(probe_hidden)), dim=1)
        query, key = attn.queries(rows), attn.keys(rows)
        probe_query = probe_key = None
        if probe is not None:
            probe_query = apply_rotary(query[:, :, length:], probe.angles)
            probe_key = apply_rotary(key[:, :, length:], probe.angles)
            query, key = query[:, :, :length], key[:, :, :length]
        query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        value = attn.split_heads(attn.v_proj(normed), attn.num_kv_heads)
        if past_key is not None and past_value is not None:
            key = torch.cat((past_key, key), dim=2)
            value = torch.cat((past_value, value), dim=2)
        mixed = attn.o_proj(attn.merge_heads(attend(query, key, value, mask)))
        return AttentionOutput(hidden + mixed, query, key, value, probe_query, probe_key)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Run the MLP block: [B, S, C] → [B, S, C]."""
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class LlamaDecoder(nn.Module):
    """Embedding, layers and final norm; the head is the checkpoint's ``lm_head``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def layer(self, index: int) -> LlamaLayer:
        """The layer, typed."""
        layer = self.layers[index]
        assert isinstance(layer, LlamaLayer)
        return layer


def rotary_angles(
    config: LlamaConfig, position_ids: Tensor, dtype: torch.dtype, *, fused: bool = False
) -> RotaryAngles:
    """Cosines and sines [B, S, D/2], computed in float32 and cast to ``dtype``.

    Shapes:
        position_ids: [B, S] int64; with M-RoPE, the [A, S] position ids of one sequence, B = 1.
    """
    half = config.head_dim // 2
    exponents = [2 * index / config.head_dim for index in range(half)]
    inverse = torch.tensor(
        [1.0 / (config.rope_factor * math.pow(config.rope_theta, exponent)) for exponent in exponents],
        dtype=torch.float32,
        device=position_ids.device,
    )
    if config.mrope_section:
        axes = torch.tensor(_mrope_axes(config), device=position_ids.device)
        angles = (position_ids.to(torch.float32).index_select(0, axes).T * inverse).unsqueeze(0)
    else:
        angles = position_ids.unsqueeze(-1).to(torch.float32) * inverse
    return RotaryAngles(angles.cos().to(dtype), angles.sin().to(dtype), fused)


def _mrope_axes(config: LlamaConfig) -> list[int]:
    """Which position id turns each frequency: time 0, row 1, column 2."""
    section = config.mrope_section
    if not config.mrope_interleaved:
        return [axis for axis, size in enumerate(section) for _ in range(size)]
    turns = [index % 3 for index in range(config.head_dim // 2)]
    return [axis if index < 3 * section[axis] else 0 for index, axis in enumerate(turns)]


class BlocksOutput(NamedTuple):
    """What a run of consecutive blocks leaves.

    Attributes:
        hidden: [B, S, C].
        attentions: The attention output of every layer whose attention ran.
    """

    hidden: Tensor
    attentions: dict[int, AttentionOutput]


def blocks_between(start: Cut, end: Cut) -> Iterator[tuple[int, str]]:
    """The blocks from one cut to the next as (layer, "attention" | "mlp"), in order."""
    cut = start
    while cut < end:
        yield cut.layer, "mlp" if cut.before_mlp else "attention"
        cut = Cut(cut.layer + 1) if cut.before_mlp else Cut(cut.layer, before_mlp=True)


def run_blocks(
    decoder: LlamaDecoder,
    start: Cut,
    end: Cut,
    hidden: Tensor,
    angles: RotaryAngles | None,
    mask: Tensor | None,
    past: Mapping[int, tuple[Tensor, Tensor]],
    probe: Probe | None = None,
    probe_layers: Sequence[int] = (),
    deepstack: Tensor | None = None,
) -> BlocksOutput:
    """Run the blocks between two cuts.

    Args:
        decoder: The decoder.
        start: First cut.
        end: Last cut.
        hidden: [B, S, C].
        angles: Rotary angles of the rows; None where no attention lies between the cuts.
        mask: See :func:`fused_attention`; None likewise.
        past: Cached keys and values [B, Hkv, P, D] by layer.
        probe: Probe rows, for the layers of ``probe_layers``.
        probe_layers: Layers that project the probe rows.
        deepstack: [J, S, C], added behind the first J layers (:mod:`edgeprune.models.deepstack`).
    """
    attentions: dict[int, AttentionOutput] = {}
    for index, block in blocks_between(start, end):
        layer = decoder.layer(index)
        if block == "mlp":
            hidden = layer.feed_forward(hidden)
            if deepstack is not None and index < deepstack.shape[0]:
                hidden = hidden + deepstack[index]
            continue
        assert angles is not None
        assert mask is not None
        key, value = past.get(index, (None, None))
        attention = layer.attention(
            hidden, angles, mask, key, value, probe=probe if index in probe_layers else None
        )
        attentions[index] = attention
        hidden = attention.hidden
    return BlocksOutput(hidden, attentions)


def check_cuts(cuts: Sequence[Cut], num_layers: int) -> None:
    """Refuse cuts that are outside the decoder, repeated, or out of order.

    Raises:
        PruningError: With the offending place and the allowed range.
    """
    for cut in cuts:
        if not 0 <= cut.layer < num_layers:
            raise PruningError(
                f"a site {cut.description} is out of range: this decoder has {num_layers} layers, "
                f"sites may lie before layer 0 … {num_layers - 1}, or before its MLP"
            )
    for earlier, later in itertools.pairwise(cuts):
        if not earlier < later:
            raise PruningError(
                f"sites out of order: {later.description} follows {earlier.description}; "
                "list the layers in increasing order, each once"
            )
