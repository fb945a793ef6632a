"""Writes the demo's four pictures and the contact sheet that the README shows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image
from questions import KINDS, Question, ask
from scenes import IMAGE_SIZE, draw_scene, render

HERE = Path(__file__).parent
SEED = 4096
"""An integer seed: the training's seeds are strings, so these scenes are held out."""


def main() -> None:
    """Draw the pictures, and ask one question of every kind that each allows."""
    folder = HERE / "pictures"
    folder.mkdir(exist_ok=True)
    entries = []
    for index in range(4):
        rng = random.Random(SEED + index)
        asked: list[Question] = []
        while len(asked) < len(KINDS):
            scene = draw_scene(rng, fewest=3)
            asked = [q for q in (ask(scene, rng, kind) for kind in KINDS) if q is not None]
        name = f"scene{index + 1}.png"
        render(scene).save(folder / name, optimize=True)
        questions = [{"kind": q.kind, "question": q.text, "answer": q.answer} for q in asked]
        entries.append({"picture": name, "questions": questions})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    columns, rows, gap = 6, 2, 4
    step = IMAGE_SIZE + gap
    sheet = Image.new("RGB", (columns * step - gap, rows * step - gap), "white")
    rng = random.Random(SEED - 1)
    for index in range(columns * rows):
        sheet.paste(render(draw_scene(rng)), (index % columns * step, index // columns * step))
    sheet.save(HERE / "contact_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
