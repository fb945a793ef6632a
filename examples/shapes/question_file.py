"""Writes training questions as a user's data would be: ``python examples/shapes/question_file.py DIR``.

DIR gets pictures/ and questions.jsonl, whose lines ``edgeprune fit`` and ``edgeprune calibrate`` read.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from questions import KINDS, ask
from scenes import draw_scene, render


def write_questions(folder: Path, pictures: int = 1500, per_picture: int = 6, seed: int = 0) -> Path:
    """Draw scenes and ask about them, every kind as often as it can be asked; returns the JSONL file."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    # A string seed, as the training's: held-out scenes have integers.
    rng = random.Random(f"atp {seed}")
    kinds = list(KINDS)
    lines = []
    for index in range(pictures):
        scene = draw_scene(rng)
        name = f"pictures/{index:05d}.png"
        render(scene).save(folder / name)
        asked = [q for kind in rng.sample(kinds, len(kinds)) if (q := ask(scene, rng, kind)) is not None]
        lines += [
            json.dumps({"image": name, "prompt": question.text, "answer": question.answer})
            for question in asked[:per_picture]
        ]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Write and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--per-picture", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_questions(arguments.folder, arguments.pictures, arguments.per_picture, arguments.seed))


if __name__ == "__main__":
    main()
