"""Trains ATP's threshold heads on the frozen example: ``python examples/shapes/train_atp.py --checkpoint DIR``.

Writes pruning.json and pruning.safetensors into the checkpoint. The decoder does not change.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from decoder import prefix_text, segment_text
from heldout import HELD_OUT_SEED, held_out_questions
from questions import KINDS, Question, ask
from safetensors.torch import save_file
from scenes import Scene, draw_scene, render
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from tower import normalise

from edgeprune.checkpoint import PRUNING_FILE, PRUNING_WEIGHTS_FILE, load_checkpoint
from edgeprune.models.vision_language import VisionLanguageModel
from edgeprune.prune.atp import Atp
from edgeprune.prune.atp_soft import AtpTraining, SoftPrefill, SoftPrunedDecoder, atp_loss
from edgeprune.pruned_model import PrunedModel
from edgeprune.pruning_plan import PruningPlan
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.tensor_names import PIXEL_VALUES

VALIDATION_SEED = 77


@dataclass(frozen=True)
class Example:
    """A question about a picture, as ids: ``prompt`` ends before the answer, ``answer`` ends in the end token."""

    kind: str
    num_objects: int
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Questions:
    """Examples with the visual tokens of their pictures.

    Shapes:
        features: [P, N0, C] after the projector; picture: the row of each example.
    """

    features: Tensor
    examples: list[Example]
    picture: list[int]


class Asker:
    """Turns scenes and questions into visual tokens and ids."""

    def __init__(self, model: VisionLanguageModel, folder: Path) -> None:
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.eos = int(settings["eos_token_id"])
        self.prefix: list[int] = self.tokenizer.encode(prefix_text()).ids
        self.num_patches = model.config.geometry.num_patches

    def example(self, scene: Scene, question: Question) -> Example:
        """One question as ids."""
        picture = [self.model.config.image_token_id] * self.num_patches
        text = self.tokenizer.encode(segment_text(question.text), add_special_tokens=False).ids
        answer = self.tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
        return Example(question.kind, len(scene.things), self.prefix + picture + text, [*answer, self.eos])

    @torch.no_grad()
    def features(self, raw: Sequence[np.ndarray], size: int = 64) -> Tensor:
        """Pictures [H, W, 3] uint8 → [P, N0, C]."""
        parts = []
        for start in range(0, len(raw), size):
            pixels = normalise(torch.from_numpy(np.stack(raw[start : start + size])))
            tower = self.model.encode({PIXEL_VALUES: pixels})
            parts.append(self.model.project(tower.features))
        return torch.cat(parts)

    def training_questions(self, seed: int, pictures: int, per_picture: int) -> Questions:
        """Questions about random scenes, every kind as often as it can be asked."""
        rng = random.Random(f"atp {seed}")
        raw, examples, picture = [], [], []
        kinds = list(KINDS)
        for index in range(pictures):
            scene = draw_scene(rng)
            raw.append(np.asarray(render(scene)))
            asked = [q for kind in rng.sample(kinds, len(kinds)) if (q := ask(scene, rng, kind)) is not None]
            examples += [self.example(scene, question) for question in asked[:per_picture]]
            picture += [index] * len(asked[:per_picture])
        return Questions(self.features(raw), examples, picture)

    def held_out(self, count: int, seed: int) -> Questions:
        """The example's held-out questions of a seed, one per picture."""
        drawn = list(held_out_questions(count, seed))
        features = self.features([np.asarray(image) for image, _, _ in drawn])
        return Questions(features, [self.example(scene, q) for _, q, scene in drawn], list(range(count)))


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences; ``targets`` is the token to predict at each row, or -100.

    Shapes:
        inputs_embeds: [B, S, C]; picture_start, prompt_length: [B]; targets: [B, S].
    """

    inputs_embeds: Tensor
    picture_start: Tensor
    prompt_length: Tensor
    targets: Tensor
    examples: list[Example]

    @classmethod
    def of(cls, model: VisionLanguageModel, questions: Questions, chosen: Sequence[int]) -> Batch:
        """Embed some of the questions."""
        examples = [questions.examples[index] for index in chosen]
        sequences = [example.prompt + example.answer[:-1] for example in examples]
        ids = torch.zeros(len(chosen), max(map(len, sequences)), dtype=torch.int64)
        targets = torch.full_like(ids, -100)
        for row, (example, sequence) in enumerate(zip(examples, sequences, strict=True)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            targets[row, len(example.prompt) - 1 : len(sequence)] = torch.tensor(example.answer)
        visual = ids == model.config.image_token_id
        embedded = model.language_model.embed_tokens(ids)
        embedded[visual] = questions.features[[questions.picture[index] for index in chosen]].flatten(0, 1)
        lengths = torch.tensor([len(example.prompt) for example in examples])
        return cls(embedded, visual.int().argmax(dim=1), lengths, targets, examples)

    def right(self, logits: Tensor) -> list[bool]:
        """Whether greedy generation would give the whole answer, from logits [B, S, V]."""
        hits = (logits.argmax(-1) == self.targets) | (self.targets < 0)
        flags: list[bool] = hits.all(-1).tolist()
        return flags


def batches(model: VisionLanguageModel, questions: Questions, size: int) -> Iterator[Batch]:
    """All questions in order."""
    for start in range(0, len(questions.examples), size):
        yield Batch.of(model, questions, range(start, min(start + size, len(questions.examples))))


@dataclass(frozen=True)
class Measured:
    """Hard pruning of many questions.

    Attributes:
        examples: The questions.
        right: Whether each was answered rightly.
        kept: Visual tokens that each site leaves, [questions, sites].
        mean_tokens: Visual tokens in the mean over all layers, [questions].
    """

    examples: list[Example]
    right: np.ndarray
    kept: np.ndarray
    mean_tokens: np.ndarray


@torch.inference_mode()
def measure(
    model: VisionLanguageModel, soft: SoftPrunedDecoder, questions: Questions, size: int = 50
) -> Measured:
    """Batches with masks of 0 and 1: what :class:`PrunedModel` computes, token by token, one at a time."""
    right, kept, counts = [], [], []
    for batch in batches(model, questions, size):
        out = soft(batch.inputs_embeds, batch.picture_start, batch.prompt_length, math.inf)
        right += batch.right(out.logits)
        kept.append(torch.stack([site.mask.sum(1) for site in out.sites], dim=1))
        counts.append(out.counts.mean(1))
    return Measured(questions.examples, np.array(right), torch.cat(kept).numpy(), torch.cat(counts).numpy())


def measure_one_by_one(pruned: PrunedModel, folder: Path, count: int, seed: int) -> Measured:
    """The reference itself, with greedy generation: dropped tokens are gone."""
    asker = Asker(pruned.model, folder)
    examples, right, kept, mean_tokens = [], [], [], []
    layers = [0, *(planned.site.cut.layer for planned in pruned.plan.sites), pruned.plan.geometry.num_layers]
    for image, question, scene in held_out_questions(count, seed):
        example = asker.example(scene, question)
        pixels = normalise(torch.from_numpy(np.array(image)[None])).numpy()
        pictures = PreparedPictures.of_whole_tiles(pixels, pruned.plan.geometry.grid)
        told, sites = pruned.generate(
            np.array(example.prompt, dtype=np.int64), pictures, max_new_tokens=8, eos_token_ids=(asker.eos,)
        )
        examples.append(example)
        right.append([*told, asker.eos] == example.answer)
        kept.append([site.kept for site in sites])
        running = [asker.num_patches, *kept[-1]]
        mean_tokens.append(float(np.dot(np.diff(layers), running)) / layers[-1])
    return Measured(examples, np.array(right), np.array(kept), np.array(mean_tokens))


class _ReachedError(Exception):
    """Ends a run at the site whose scores are wanted."""


@torch.inference_mode()
def calibrate(soft: SoftPrunedDecoder, sample: Sequence[Batch], counts: Sequence[int]) -> None:
    """Start θ_r so that each site leaves about ``counts`` tokens of every picture.

    A constant threshold would leave many tokens of one picture and few of another, whatever the question. So the
    heads start as a ridge regression: from the scores to the threshold that leaves the given number.
    """
    for site, count in enumerate(counts):
        heads, weight = soft.heads[site], soft.method.self_weight
        seen: list[Tensor] = []

        def collect(_: nn.Module, scores: tuple[Tensor, Tensor], seen: list[Tensor] = seen) -> None:
            seen.append(torch.stack(scores))
            raise _ReachedError

        hook = heads.register_forward_pre_hook(collect)
        for batch in sample:
            with suppress(_ReachedError):
                soft(batch.inputs_embeds, batch.picture_start, batch.prompt_length, math.inf)
        hook.remove()
        self_score, cross_score = torch.cat(seen, dim=1)
        ranked = (weight * self_score + (1 - weight) * cross_score).sort(dim=1, descending=True).values
        wanted = torch.logit((ranked[:, count - 1] + ranked[:, count]) / 2, eps=1e-4).double()
        scores = torch.cat((self_score, cross_score), dim=1).double()
        centred = scores - scores.mean(0)
        gram = centred.T @ centred + RIDGE * torch.eye(scores.shape[1], dtype=torch.float64)
        slope = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean()))
        heads.proj.weight[0], heads.proj.bias[0] = slope.float(), 0.0
        heads.head_r.weight[0, 0] = 1.0
        heads.head_r.bias.fill_(float(wanted.mean() - scores.mean(0) @ slope))
        explained = 1 - (wanted - wanted.mean() - centred @ slope).var() / wanted.var()
        say(f"site {site}: the scores explain {explained:.2f} of the threshold for {count} tokens")


def train(
    model: VisionLanguageModel,
    soft: SoftPrunedDecoder,
    questions: Questions,
    validation: Questions,
    *,
    seed: int,
    steps: int,
    size: int,
    validate_every: int,
) -> None:
    """Minimise L_ntp + λ_ATP·L_ATP + λ_target·L_target over the heads."""
    options = soft.options
    rng = random.Random(f"order {seed}")
    optimizer = torch.optim.AdamW(soft.parameters(), weight_decay=0.0)
    order: list[int] = []
    started = time.monotonic()
    hits: list[bool] = []
    for step in range(steps):
        if len(order) < size:
            order = rng.sample(range(len(questions.examples)), len(questions.examples))
        batch = Batch.of(model, questions, [order.pop() for _ in range(size)])
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate_at(progress)
        temperature = options.temperature(progress)
        out: SoftPrefill = soft(batch.inputs_embeds, batch.picture_start, batch.prompt_length, temperature)
        ntp = F.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten())
        loss = ntp + atp_loss(out, soft.method, options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits += batch.right(out.logits)
        if step % 20 == 19 or step == steps - 1:
            thetas = " ".join(
                f"{s.theta_r.mean().item():.3f}/{s.theta_s.mean().item():.3f}" for s in out.sites
            )
            left = " ".join(f"{site.mask.sum(1).mean().item():.1f}" for site in out.sites)
            say(
                f"step {step + 1:4d} {time.monotonic() - started:5.0f}s T {temperature:7.1f} "
                f"loss {loss.item():6.3f} answers {ntp.item():.4f} right {np.mean(hits):.3f} "
                f"| tokens {out.counts.mean().item():5.1f} | left {left} | thresholds {thetas}"
            )
            hits.clear()
        if step % validate_every == validate_every - 1 or step == steps - 1:
            hard = measure(model, soft, validation)
            say(
                f"     validation, hard: right {hard.right.mean():.4f} | tokens {hard.mean_tokens.mean():.1f} | "
                f"left {' '.join(f'{count:.1f}' for count in hard.kept.mean(0))}"
            )


def say(line: str) -> None:
    """Print at once, so that a log file can be followed."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def report(unpruned: Measured, pruned: Measured) -> None:
    """Accuracy by kind, tokens by site, and how the tokens follow the picture."""
    kinds = np.array([example.kind for example in pruned.examples])
    objects = np.array([example.num_objects for example in pruned.examples])
    say(f"{'kind':14s} unpruned   pruned")
    for kind in KINDS:
        chosen = kinds == kind
        say(f"{kind:14s} {unpruned.right[chosen].mean():8.4f} {pruned.right[chosen].mean():8.4f}")
    before, after = unpruned.right.mean(), pruned.right.mean()
    say(f"{'all':14s} {before:8.4f} {after:8.4f}   kept {after / before:.2%} of the accuracy")
    for name, counts in [
        *((f"left by site {site}", pruned.kept[:, site]) for site in range(pruned.kept.shape[1])),
        ("mean over all layers", pruned.mean_tokens),
    ]:
        low, high = np.percentile(counts, (5, 95))
        correlation = np.corrcoef(counts, objects)[0, 1] if counts.std() > 0 else 0.0
        say(
            f"{name:22s} mean {counts.mean():6.2f}  p5 {low:5.1f}  p95 {high:5.1f}  "
            f"correlation with the number of objects {correlation:+.2f}"
        )
    share = pruned.mean_tokens.mean() / unpruned.mean_tokens.mean()
    say(f"share of the visual tokens kept: {share:.2%}")


def write(folder: Path, soft: SoftPrunedDecoder) -> None:
    """Write pruning.json and pruning.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"method": soft.method.name, "parameters": asdict(soft.method)}
    (folder / PRUNING_FILE).write_text(json.dumps({"methods": [entry]}, indent=2) + "\n", encoding="utf-8")
    save_file(soft.weights(), folder / PRUNING_WEIGHTS_FILE)


# Chosen by measurement on held-out pictures. A quarter of the tokens, those with the highest S_cross, answers nearly
# every question; those with the highest S_self do not, so S_self gets a small weight. Before layer 8 the text rows
# have read the picture, and two visual tokens are enough. Both scores are brought to 0 … 1 within a picture: the
# logits of S_self are far outside of what a threshold σ(…) can reach.
METHOD = Atp(layers=(1, 4, 8), hidden_width=32, self_norm="minmax", cross_norm="minmax", self_weight=0.05)
START = (56, 24, 2)
RIDGE = 3.0
# Below T = 100 half-open masks add up to so many tokens that the budget closes sites the hard masks leave open.
TRAINING = AtpTraining(
    temperature_start=150.0,
    temperature_end=2000.0,
    drop_below=1e-6,
    lambda_atp=0.001,
    lambda_target=0.02,
    target_tokens=35.0,
    learning_rate=5e-4,
    theta_s=0.93,
)


def main() -> None:
    """Train, write, and compare with the unpruned model on the held-out questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--output", type=Path, help="folder for the two files; default: the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=32, help="questions per step")
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--layers", type=int, nargs="+", default=METHOD.layers, help="sites lie before these")
    parser.add_argument(
        "--start", type=int, nargs="+", default=START, help="tokens each site leaves at first"
    )
    parser.add_argument(
        "--target-tokens", type=float, default=TRAINING.target_tokens, help="average over the layers"
    )
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions to ask at the end")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    folder = arguments.checkpoint
    output = arguments.output or folder
    unpruned = load_checkpoint(folder, methods=(), dtype=torch.float32)
    model = unpruned.model
    asker = Asker(model, folder)
    questions = asker.training_questions(arguments.seed, arguments.pictures, per_picture=6)
    validation = asker.held_out(400, VALIDATION_SEED)
    say(f"{len(questions.examples)} questions about {arguments.pictures} pictures")
    method = replace(METHOD, layers=tuple(arguments.layers))
    soft = SoftPrunedDecoder(model, method, replace(TRAINING, target_tokens=arguments.target_tokens))
    calibrate(soft, list(islice(batches(model, questions, 50), 24)), arguments.start)
    train(
        model,
        soft,
        questions,
        validation,
        seed=arguments.seed,
        steps=arguments.steps,
        size=arguments.size,
        validate_every=100,
    )
    write(output, soft)
    say(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")

    pruned = PrunedModel(model, PruningPlan((method,), model.config.geometry), soft.weights())
    count = arguments.questions
    report(*(measure_one_by_one(each, folder, count, HELD_OUT_SEED) for each in (unpruned, pruned)))


if __name__ == "__main__":
    main()
