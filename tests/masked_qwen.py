"""Pruning as a dense computation by transformers' decoder with M-RoPE: dropped tokens stay, masked in later layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from masked_decoder import ChooseKept, LayerInputs, MaskedDecoder
from numpy_references import highest, last_row_scores
from tiny_qwen import Reference, picture

from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.pruned_model import PrunedModel

TOLERANCE = 1e-4
# Pictures of two prompts.
SIZES = {"one": [(60, 44)], "two": [(40, 24), (32, 70)]}


class MaskedQwen(MaskedDecoder):
    """transformers' decoder of a checkpoint, with a mask of its own in every layer and positions on three axes."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.model = reference.model
        self.decoder = self.model.model.language_model

    @torch.no_grad()
    def decoder_inputs(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        """What transformers hands to its decoder for a prompt."""
        seen: list[Mapping[str, Any]] = []
        hook = self.decoder.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        self.reference.steps(dict(inputs), [])
        hook.remove()
        return seen[0]

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


class PromptCase:
    """A prompt with pictures, for both sides.

    Shapes:
        embeds: [1, S, C]; positions: [3, 1, S]; additions: [1, S, C] each, what DeepStack adds behind the first layers.
    """

    def __init__(self, dense: MaskedQwen, sizes: Sequence[tuple[int, int]]) -> None:
        reference = dense.reference
        images = [picture(*size, seed + 5) for seed, size in enumerate(sizes)]
        self.inputs = reference.chat(images, "How many squares are in the picture?")
        self.ids = self.inputs["input_ids"][0].numpy()
        self.visual = np.flatnonzero(self.ids == reference.image_token_id)
        preprocessing = picture_preprocessing_from_checkpoint(reference.folder, reference.spec.model_type)
        self.pictures = preprocessing.prepare(images, (16, 16))
        given = dense.decoder_inputs(self.inputs)
        self.embeds, self.positions = given["inputs_embeds"], given["position_ids"]
        self.additions = [torch.zeros_like(self.embeds) for _ in given.get("deepstack_visual_embeds") or ()]
        for rows, features in zip(self.additions, given.get("deepstack_visual_embeds") or (), strict=True):
            rows[given["visual_pos_masks"]] = features

    def run(
        self, dense: MaskedQwen, sites: Mapping[int, ChooseKept]
    ) -> tuple[torch.Tensor, dict[int, LayerInputs], list[np.ndarray]]:
        """The prompt, computed densely."""
        return dense.run_at(self.embeds, self.positions, sites, additions=self.additions)


def keep_highest(layer: int, visual: np.ndarray, count: int) -> ChooseKept:
    """FastV: the attention of the last row in the layer before."""

    def choose(layers: Mapping[int, LayerInputs], alive: np.ndarray) -> np.ndarray:
        before = layers[layer - 1]
        rows = np.flatnonzero(alive)
        query, key = (tensor[0].double().numpy()[:, rows] for tensor in (before.query, before.key))
        scores = last_row_scores(query, key)
        own = np.flatnonzero(np.isin(rows, visual))
        chosen = alive.copy()
        chosen[rows[own]] = False
        chosen[rows[own[highest(scores[own], count)]]] = True
        return chosen

    return choose


def compare_with_dense(
    model: PrunedModel, dense: MaskedQwen, case: PromptCase, sites: Mapping[int, ChooseKept]
) -> None:
    """Kept tokens, caches and logits of prefill and decode against the dense run."""
    state = model.prefill(case.ids, case.pictures)
    embeds, positions = case.embeds, case.positions
    expected, layers, alive = case.run(dense, sites)
    kept = np.flatnonzero(np.isin(case.visual, np.flatnonzero(alive[-1])))
    assert state.sites[-1].slots == tuple(kept)
    assert 0 < len(kept) < len(case.visual)
    assert expected[-1].std() > 0.1
    first = int(positions.max()) + 1
    assert state.next_position == first
    for step in range(3):
        assert (state.logits - expected[-1]).abs().max() <= TOLERANCE
        for index, (key, value) in state.caches.items():
            rows = torch.from_numpy(np.flatnonzero(alive[index]))
            assert key.shape[2] == len(rows)
            assert (key - layers[index].key[:, :, rows]).abs().max() <= TOLERANCE
            assert (value - layers[index].value[:, :, rows]).abs().max() <= TOLERANCE
        token = 40 + 13 * step
        state.logits = model.decode(token, state.next_position + step, state.caches)
        embeds = torch.cat((embeds, dense.decoder.embed_tokens(torch.tensor([[token]]))), dim=1).detach()
        positions = torch.cat((positions, torch.full((3, 1, 1), first + step)), dim=2)
        alive = [np.append(rows, True) for rows in alive]
        frozen = {layer: lambda _layers, _alive, kept=alive[layer]: kept for layer in sites}
        expected, layers, _ = dense.run_at(embeds, positions, frozen, additions=case.additions)
