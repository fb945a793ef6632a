"""Small training data for the fits of tiny checkpoints."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 190, 60), "white": (240, 240, 240)}


def write_data(folder: Path, samples: int = 24, **fields: object) -> Path:
    """Pictures of one colour with noise, and questions about the colour; ``fields`` go into every line."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        noise = rng.integers(-40, 40, (24, 24, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    questions = ("What colour is it?", "Which colour?", "Name the colour of the picture.")
    lines = []
    for index in range(samples):
        name = list(COLOURS)[index % len(COLOURS)]
        line = {
            "image": f"{name}.png",
            "prompt": questions[index % len(questions)],
            "answer": f"It is {name}.",
        }
        lines.append(json.dumps({**line, **fields}))
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
