"""Held-out questions: pictures that the training, whose seeds are strings, never draws."""

from __future__ import annotations

import random
from collections.abc import Iterator

from PIL import Image
from questions import KINDS, Question, ask
from scenes import Scene, draw_scene, render

HELD_OUT_SEED = 2024


def held_out_questions(
    count: int = 2000, seed: int = HELD_OUT_SEED
) -> Iterator[tuple[Image.Image, Question, Scene]]:
    """Yield ``count`` questions, each about a picture of its own, the kinds in turn."""
    kinds = list(KINDS)
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        question = None
        while question is None:
            scene = draw_scene(rng)
            question = ask(scene, rng, kinds[index % len(kinds)])
        yield render(scene), question, scene
