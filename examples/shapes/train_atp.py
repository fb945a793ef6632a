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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from decoder import prefix_text, segment_text
from heldout import HELD_OUT_SEED, held_out_questions
from questions import KINDS, Question, ask
from safetensors.torch import save_file
from scenes import Scene, draw_scene, render
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tower import normalise

from edgeprune.checkpoint import PRUNING_FILE, PRUNING_WEIGHTS_FILE, load_checkpoint
from edgeprune.models.llava import LlavaModel
from edgeprune.prune.atp import Atp
from edgeprune.prune.atp_soft import AtpTraining, SoftPrefill, SoftPrunedDecoder, atp_loss
from edgeprune.pruned_model import PrunedModel

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

    def __init__(self, model: LlavaModel, folder: Path) -> None:
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
            parts.append(self.model.encode_pictures(pixels).features)
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
    def of(cls, model: LlavaModel, questions: Questions, chosen: Sequence[int]) -> Batch:
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


def batches(model: LlavaModel, questions: Questions, size: int) -> Iterator[Batch]:
    """All questions in order."""
    for start in range(0, len(questions.examples), size):
        yield Batch.of(model, questions, range(start, min(start + size, len(questions.examples))))
