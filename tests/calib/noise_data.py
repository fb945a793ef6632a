"""Calibration data of random pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_data(folder: Path, count: int, seed: int = 0) -> Path:
    """Write pictures and a JSONL file of one question about each; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.PCG64(seed))
    lines = []
    for index in range(count):
        # Coarse blocks, so that pictures differ in what stands out.
        blocks = draw.integers(0, 256, (3 + index % 5, 4, 3), np.uint8)
        Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(folder / f"{index:03}.png")
        question = "What is " + "very " * (index % 4) + "large?"
        lines.append(json.dumps({"image": f"{index:03}.png", "prompt": question}) + "\n")
    path = folder / "data.jsonl"
    path.write_text("".join(lines))
    return path
