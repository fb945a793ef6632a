"""Fits ATP's threshold heads to the example's questions: ``python examples/shapes/train_atp.py --output DIR``.

DIR becomes a copy of the checkpoint with pruning.json and pruning.safetensors; the decoder does not change. Prints the
accuracy on held-out questions beside that of the unpruned model and of FastV at the same number of visual tokens.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from heldout import HELD_OUT_SEED, held_out_questions
from question_file import write_questions
from questions import KINDS

from edgeprune.calib.fit import FitOptions, choose_method, fit, training_from_settings
from edgeprune.calib.fit_progress import FitBar
from edgeprune.calib.token_target import TokenTarget
from edgeprune.checkpoint import load_checkpoint, read_config
from edgeprune.export.input_settings import InputSettings
from edgeprune.prune.fastv import FastV
from edgeprune.prune.method import PruningMethod


@dataclass(frozen=True)
class Measured:
    """Greedy answers to many questions, tokens dropped for good.

    Attributes:
        kinds: The questions' kinds.
        num_objects: In each picture.
        right: Whether each was answered rightly.
        kept: Visual tokens that each site leaves, [questions, sites].
        mean_tokens: Visual tokens in the mean over all layers, [questions].
    """

    kinds: np.ndarray
    num_objects: np.ndarray
    right: np.ndarray
    kept: np.ndarray
    mean_tokens: np.ndarray


def measure(
    checkpoint: Path, count: int, seed: int, methods: tuple[PruningMethod, ...] | None = None
) -> Measured:
    """Ask the torch reference, one question after the other."""
    pruned = load_checkpoint(checkpoint, methods=methods, dtype=torch.float32)
    settings = InputSettings.from_checkpoint(checkpoint, read_config(checkpoint))
    encoder, geometry = settings.prompt_encoder(), pruned.plan.geometry
    layers = [0, *(planned.site.cut.layer for planned in pruned.plan.sites), geometry.num_layers]
    kinds, objects, right, kept, mean_tokens = [], [], [], [], []
    for image, question, scene in held_out_questions(count, seed):
        pictures = settings.preprocessing.prepare([image], geometry.grid)
        ids = encoder.encode_chat(question.text, pictures.layout.tokens_per_image).token_ids
        stops = settings.prompt_format.eos_token_ids
        told, sites = pruned.generate(ids, pictures, max_new_tokens=8, eos_token_ids=stops)
        kinds.append(question.kind)
        objects.append(len(scene.things))
        right.append(encoder.tokenizer.decode(told).strip() == question.answer)
        kept.append([site.kept for site in sites])
        running = [geometry.num_patches, *kept[-1]]
        mean_tokens.append(float(np.dot(np.diff(layers), running)) / layers[-1])
    return Measured(*map(np.array, (kinds, objects, right, kept, mean_tokens)))


def fastv_at(tokens: float, checkpoint: Path) -> FastV:
    """FastV before layer 1 with the average over the layers that comes nearest."""
    geometry = load_checkpoint(checkpoint, methods=()).model.config.geometry
    keep = (tokens * geometry.num_layers - geometry.num_patches) / (geometry.num_layers - 1)
    return FastV(layer=1, keep=round(keep))


def report(unpruned: Measured, fitted: Measured, fastv: Measured) -> None:
    """Accuracy by kind, tokens by site, and how the tokens follow the picture."""
    print(f"{'kind':14s} unpruned     atp   fastv")
    for kind in (*KINDS, "all"):
        chosen = np.full(len(fitted.kinds), True) if kind == "all" else fitted.kinds == kind
        rates = (100 * each.right[chosen].mean() for each in (unpruned, fitted, fastv))
        print(f"{kind:14s} " + " ".join(f"{rate:7.2f}%" for rate in rates))
    for name, counts in [
        *((f"left by site {site}", fitted.kept[:, site]) for site in range(fitted.kept.shape[1])),
        ("mean over all layers", fitted.mean_tokens),
    ]:
        low, high = np.percentile(counts, (5, 95))
        correlation = np.corrcoef(counts, fitted.num_objects)[0, 1] if counts.std() > 0 else 0.0
        print(
            f"{name:22s} mean {counts.mean():6.2f}  p5 {low:5.1f}  p95 {high:5.1f}  "
            f"correlation with the number of objects {correlation:+.2f}"
        )
    share = fitted.mean_tokens.mean() / unpruned.mean_tokens.mean()
    print(f"share of the visual tokens kept: {share:.2%}; FastV's tokens: {fastv.mean_tokens.mean():.2f}")


def main() -> None:
    """Write the questions, fit, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--target-tokens", default="25%", help="average over the layers, or a share")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="append", default=[], help="NAME=VALUE, as for edgeprune fit")
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions to ask at the end")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    folder = arguments.output.with_name(f"{arguments.output.name}-questions")
    questions = write_questions(folder, arguments.pictures, seed=arguments.seed)
    with FitBar() as progress:
        fit(
            arguments.checkpoint,
            questions,
            arguments.output,
            choose_method(arguments.checkpoint, "atp"),
            FitOptions(
                TokenTarget.parse(arguments.target_tokens), steps=arguments.steps, seed=arguments.seed
            ),
            training=training_from_settings("atp", arguments.train),
            progress=progress,
        )
    print(f"fitted in {(time.monotonic() - started) / 60:.1f} minutes")
    count = arguments.questions
    if count:
        fitted = measure(arguments.output, count, HELD_OUT_SEED)
        others = ((), (fastv_at(fitted.mean_tokens.mean(), arguments.output),))
        unpruned, fastv = (measure(arguments.output, count, HELD_OUT_SEED, methods) for methods in others)
        report(unpruned, fitted, fastv)


if __name__ == "__main__":
    main()
