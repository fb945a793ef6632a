"""Bundles of a random model that keep what a benchmark asks for: their pruning weights are chosen, not learned."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from decoders import RandomPrompt
from random_llava import LlavaSize, write_random_llava
from safetensors.torch import save_file

from edgeprune import tensor_names as names
from edgeprune.checkpoint import PRUNING_FILE, PRUNING_WEIGHTS_FILE, load_checkpoint
from edgeprune.export.exporter import export
from edgeprune.export.progress import ProgressBars
from edgeprune.prune.atp import Atp, AtpSelector
from edgeprune.prune.dyrate import TOKEN_KINDS, DyRate
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.registry import methods_to_json
from edgeprune.pruned_model import PrunedModel
from edgeprune.pruning_plan import PruningPlan

PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32


def prepare(
    workdir: Path, size: LlavaSize, keep: Sequence[int], methods: Mapping[str, Sequence[PruningMethod] | None]
) -> None:
    """Write a random float32 checkpoint and its bundles into ``workdir`` where they are missing.

    Args:
        workdir: Gets "checkpoint", and a folder for each method's name in lower case.
        size: Of the model.
        keep: Visual tokens of one picture behind ATP's sites.
        methods: What is exported, by name; None is ATP.
    """
    checkpoint = workdir / "checkpoint"
    if not (checkpoint / PRUNING_FILE).is_file():
        model = write_random_llava(checkpoint, size)
        prompt = RandomPrompt(size, model.config.image_token_index)
        del model
        write_pruning(checkpoint, keep, prompt)
    for name, chosen in methods.items():
        if not (workdir / name.lower()).is_dir():
            with ProgressBars() as progress:
                export(checkpoint, workdir / name.lower(), methods=chosen, progress=progress)


def scaled_atp(num_layers: int) -> Atp:
    """ATP before the paper's layers, scaled to a decoder's depth."""
    layers = tuple(max(1, round(layer * num_layers / PAPER_DEPTH)) for layer in PAPER_LAYERS)
    return Atp(layers=layers, hidden_width=8, self_norm="minmax", cross_norm="minmax")


def write_pruning(checkpoint: Path, keep: Sequence[int], prompt: RandomPrompt) -> None:
    """Make ATP the pruning of a checkpoint; of this prompt exactly so many visual tokens survive each site.

    The heads have zero weights, and biases that put θ_r between the k-th and the next score of this prompt. The same
    file holds a predictor for DyRate.

    Args:
        checkpoint: Folder of an unpruned checkpoint.
        keep: Visual tokens behind each site.
        prompt: With one picture.
    """
    source = load_checkpoint(checkpoint, methods=())
    method = scaled_atp(source.model.config.decoder.num_layers)
    plan = PruningPlan((method,), source.model.config.geometry)
    weights = {name: torch.zeros(shape) for name, shape in plan.weight_shapes().items()}
    for site, count in enumerate(keep):
        weights[f"atp.site{site}.head_s.bias"].fill_(20.0)  # θ_s = 1: no token is kept for its place
        # Sites behind this one keep everything or nothing; only this site's scores are read.
        scores = _scores(PrunedModel(source.model, plan, weights), site, prompt)
        ordered = scores.sort(descending=True).values
        theta = torch.tensor(float((ordered[count - 1] + ordered[count]) / 2), dtype=torch.float64)
        weights[f"atp.site{site}.head_r.bias"].fill_(float(torch.logit(theta)))
    weights |= _growing_rate(DyRate(), source.model.config.decoder.num_heads)
    save_file(weights, checkpoint / PRUNING_WEIGHTS_FILE)
    # Last: a checkpoint with this file is whole.
    (checkpoint / PRUNING_FILE).write_text(json.dumps({"methods": methods_to_json([method])}))


def _scores(model: PrunedModel, site: int, prompt: RandomPrompt) -> torch.Tensor:
    """S_red of the visual tokens that reach a site."""
    token_ids = prompt.token_ids(prompt.num_pictures * prompt.size.visual_tokens)
    prefill = model.prefill(token_ids, prompt.pictures(), record=True)
    inputs = next(inputs for stage, inputs, _ in prefill.record if stage.name == f"site{site}")
    selector = model.selects[site].selector
    assert isinstance(selector, AtpSelector)
    slots = inputs[names.VISUAL_SLOTS]
    layer = selector.layer - 1
    scores = selector.scores(
        inputs[names.query(layer)],
        inputs[names.present_key(layer)],
        slots,
        inputs[names.TEXT_ROWS],
        inputs[names.GRID_IDS],
        inputs[names.VISUAL_PLACES],
    )
    return scores.redundant_score[slots >= 0]


def _growing_rate(method: DyRate, num_heads: int) -> dict[str, torch.Tensor]:
    """A classifier that chooses the rate nearest to R/2 + 50·x, where x is the heads' mean attention to the answer.

    So half of the tokens go in prefill, and a tenth more for every two percent of the attention to the answer. The
    rate k nearest to c is the one with the highest 2kc - k².
    """
    rates = torch.arange(method.num_rates, dtype=torch.float32)
    weight = torch.zeros(method.num_rates, num_heads, len(TOKEN_KINDS))
    weight[:, :, TOKEN_KINDS.index("response")] = (2 * 50 * rates / num_heads)[:, None]
    bias = rates * method.num_rates - rates**2
    return {"dyrate.predictor.weight": weight.flatten(1), "dyrate.predictor.bias": bias}
