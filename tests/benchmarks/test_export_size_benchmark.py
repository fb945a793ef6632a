"""benchmarks/export_size.py at the smallest size, and the checkpoint that it writes."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from export_size import measure, scaled
from printed_table import table
from random_llava import LLAVA_7B, write_random_shards
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from edgeprune.checkpoint import load_checkpoint


def test_shards_hold_a_whole_checkpoint_in_float16(tmp_path, small_size):
    total = write_random_shards(tmp_path, small_size, shard_bytes=200_000)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(weight_map.values())) == shards
    held = 0
    for shard in shards:
        with safe_open(tmp_path / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.float16
                held += tensor.nbytes
    assert held == total
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = load_checkpoint(tmp_path, methods=()).model
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)


def test_the_shapes_are_those_of_llava_7b():
    """https://huggingface.co/llava-hf/llava-1.5-7b-hf: 7,063,427,072 parameters, 576 visual tokens a picture."""
    assert scaled(32, 24) == LLAVA_7B
    assert LLAVA_7B.visual_tokens == 576
    assert scaled(4, 2, scale=4).hidden_size // scaled(4, 2, scale=4).num_heads == 128


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux tells it")
def test_a_small_export_is_measured_and_answers(tmp_path, small_size, capsys):
    met = measure(tmp_path, replace(small_size, num_layers=2), "none")
    printed = capsys.readouterr().out
    graphs = {row["graph"]: row for row in table(printed, "graph")}
    assert set(graphs) == {"vision", "projector", "embed", "segment0"}
    assert all(float(row["trace s"]) > 0 for row in graphs.values())
    targets = {row["result"]: row for row in table(printed, "result")}
    peak, bundle = targets["peak of the export"], targets["size of the bundle"]
    # A process with torch is larger than this model's weights, and far below 2 GB.
    assert 0.1 < float(peak["GB"]) < 2
    assert 0.5 < float(bundle["of weights"]) < 2
    assert (peak["verdict"], met) == ("met", bundle["verdict"] == "met")
    assert "4 new ones in" in printed
