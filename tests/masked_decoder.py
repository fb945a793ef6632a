"""Pruning as a dense computation by transformers: dropped tokens stay, masked in all later layers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from edgeprune.runtimes.pictures import PreparedPictures


class LayerInputs(NamedTuple):
    """What a dense layer computes before its attention.

    Shapes:
        hidden: [1, S, C]; query: [1, H, S, D]; key, value: [1, Hkv, S, D].
    """

    hidden: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


ChooseKept = Callable[[Mapping[int, LayerInputs], np.ndarray], np.ndarray]
"""From the layers run so far and the rows alive [S] bool to the rows alive after the site."""


class MaskedDecoder:
    """transformers' decoder of a checkpoint, with a mask of its own in every layer."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.decoder = self.model.model.language_model

    @torch.no_grad()
    def embed(self, input_ids: np.ndarray, pictures: PreparedPictures | None) -> torch.Tensor:
        """The decoder's input embeddings [1, S, C], as transformers merges them."""
        seen: list[torch.Tensor] = []
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        self.logits(input_ids, pictures)
        hook.remove()
        return seen[0]

    @torch.no_grad()
    def logits(self, input_ids: np.ndarray, pictures: PreparedPictures | None) -> torch.Tensor:
        """Unpruned logits [S, V]."""
        pixels = {} if pictures is None else {"pixel_values": torch.from_numpy(pictures.pixel_values)}
        return self.model(input_ids=torch.from_numpy(input_ids)[None], use_cache=False, **pixels).logits[0]

    @torch.no_grad()
    def run(
        self, inputs_embeds: torch.Tensor, sites: Mapping[int, ChooseKept]
    ) -> tuple[torch.Tensor, dict[int, LayerInputs], list[np.ndarray]]:
        """Run all layers densely; ``sites`` maps the first layer that misses the dropped keys to the choice.

        Shapes:
            inputs_embeds: [1, S, C].
            returns: logits [S, V], every layer's inputs, the rows alive in every layer.
        """
        length = inputs_embeds.shape[1]
        position_ids = torch.arange(length)[None]
        cos_sin = self.decoder.rotary_emb(inputs_embeds, position_ids)
        alive, history = np.ones(length, dtype=bool), []
        layers: dict[int, LayerInputs] = {}
        hidden = inputs_embeds
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        for index, layer in enumerate(self.decoder.layers):
            layers[index] = self.project(index, hidden, position_ids)
            if index in sites:
                alive = sites[index](layers, alive)
            history.append(alive)
            # A dropped row still sees itself, so that its softmax is defined; nobody reads it.
            visible = causal & (torch.from_numpy(alive) | torch.eye(length, dtype=torch.bool))
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
            out = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=cos_sin)
            hidden = out[0] if isinstance(out, tuple) else out
        if len(layers) in sites:
            history.append(sites[len(layers)](layers, alive))
        return self.model.lm_head(self.decoder.norm(hidden))[0], layers, history

    @torch.no_grad()
    def project(self, index: int, hidden: torch.Tensor, position_ids: torch.Tensor) -> LayerInputs:
        """Norm, projections and rotary embedding of a layer, for hidden [1, S, C] at positions [1, S]."""
        layer = self.decoder.layers[index]
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos_sin = self.decoder.rotary_emb(hidden, position_ids)
        return LayerInputs(hidden, *apply_rotary_pos_emb(query, key, *cos_sin), value)
