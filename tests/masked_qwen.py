"""Pruning as a dense computation by transformers' decoder with M-RoPE: dropped tokens stay, masked in later layers."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from masked_decoder import ChooseKept, LayerInputs, MaskedDecoder
from tiny_qwen import Reference


class MaskedQwen(MaskedDecoder):
    """transformers' decoder of a checkpoint, with a mask of its own in every layer and positions on three axes."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.model = reference.model
        self.decoder = self.model.model.language_model

    @torch.no_grad()
    def prompt(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's input embeddings [1, S, C] and position ids [3, 1, S], as transformers makes them."""
        seen: list[Mapping[str, torch.Tensor]] = []
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        self.reference.steps(dict(inputs), [])
        hook.remove()
        return seen[0]["inputs_embeds"], seen[0]["position_ids"]

    @torch.no_grad()
    def additions(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """What DeepStack adds behind the first layers, [1, S, C] each, as transformers hands it to its decoder."""
        seen: list[Mapping[str, torch.Tensor]] = []
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        self.reference.steps(dict(inputs), [])
        hook.remove()
        rows = seen[0]["visual_pos_masks"]
        laid = [torch.zeros_like(seen[0]["inputs_embeds"]) for _ in seen[0]["deepstack_visual_embeds"]]
        for whole, features in zip(laid, seen[0]["deepstack_visual_embeds"], strict=True):
            whole[rows] = features
        return laid

    @torch.no_grad()
    def run_at(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        sites: Mapping[int, ChooseKept],
        *,
        first_layer: int = 0,
        additions: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, dict[int, LayerInputs], list[np.ndarray]]:
        """Run layers densely; ``sites`` maps the first layer that misses the dropped keys to the choice.

        Shapes:
            inputs_embeds: [1, S, C]; position_ids: [3, 1, S]; additions: [1, rows of the prompt, C], behind the first
            layers.
            returns: logits [S, V], every layer's inputs, the rows alive in every layer.
        """
        length = inputs_embeds.shape[1]
        cos_sin = self.decoder.rotary_emb(inputs_embeds, position_ids)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        alive, hidden = np.ones(length, dtype=bool), inputs_embeds
        layers: dict[int, LayerInputs] = {}
        history: list[np.ndarray] = []
        for index, layer in list(enumerate(self.decoder.layers))[first_layer:]:
            layers[index] = self.project(index, hidden, position_ids)
            if index in sites:
                alive = sites[index](layers, alive)
            history.append(alive)
            # A dropped row still sees itself, so that its softmax is defined; nobody reads it.
            visible = causal & (torch.from_numpy(alive) | torch.eye(length, dtype=torch.bool))
            mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
            out = layer(hidden, attention_mask=mask, position_embeddings=cos_sin)
            hidden = out[0] if isinstance(out, tuple) else out
            if index < len(additions):
                generated = length - additions[index].shape[1]
                hidden = hidden + torch.nn.functional.pad(additions[index], (0, 0, 0, generated))
        return self.model.lm_head(self.decoder.norm(hidden))[0], layers, history
