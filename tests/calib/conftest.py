"""Checkpoints of the families whose pictures differ in their number of tokens, and pictures that do."""

import json

import pytest
from fit_data import write_data
from PIL import Image
from tiny_internvl import TinyInternvl, build_internvl
from tiny_llava_next import build_llava_next
from tiny_qwen import QWEN2, QWEN3, QWEN25, build_qwen


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory):
    """Pictures of several sizes and shapes, one sample with two of them."""
    folder = tmp_path_factory.mktemp("sizes")
    data = write_data(folder, samples=6)
    for name, size in (("red", (60, 24)), ("blue", (30, 70))):
        Image.open(folder / f"{name}.png").resize(size).save(folder / f"{name}.png")
    line = {"image": ["red.png", "blue.png"], "prompt": "What are they?", "answer": "red and blue"}
    data.write_text(data.read_text() + json.dumps(line) + "\n")
    return data


@pytest.fixture(
    scope="module",
    params=["llava_next", "internvl", "internvl qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"],
)
def family_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-")) / "checkpoint"
    if request.param == "llava_next":
        return build_llava_next(folder)
    if request.param == "internvl":
        return build_internvl(folder)
    if request.param == "internvl qwen3":
        return build_internvl(folder, TinyInternvl(text="qwen3", decoder={"head_dim": 16}))
    return build_qwen(folder, {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN25, "qwen3_vl": QWEN3}[request.param])
