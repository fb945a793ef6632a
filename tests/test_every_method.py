"""Every pruning method through a whole bundle: what ONNX Runtime keeps is what the torch reference keeps."""

import shutil

import numpy as np
import pytest
import torch
from tiny_checkpoints import add_atp, add_dyrate, random_prompt, write_pruning

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.export.exporter import export
from edgeprune.prune.registry import METHODS
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.guide import GuideInputs
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend

PROMPTS = 50

PARAMETERS = {
    "adaptprune": {"layer": 2, "keep": 9},
    "atp": {"layers": [1, 3]},
    "cdpruner": {"keep": 14},
    "dart": {"keep_ratio": 0.4},
    "dyrate": {"layer": 2},
    "evit": {"layers": [0, 2], "keep_ratio": 0.6},
    "fastv": {"layer": 1, "keep_ratio": 0.4},
    "host": {"layers": [1, 3], "keep_ratio": 0.6},
    "ivtp": {
        "tokens_after_vision": 20,
        "tokens_after_decoder": 8,
        "decoder_layers": 3,
        "group_size": 2,
        "text_selection": "all",
    },
    "ivtp-v": {"keep": 11, "group_size": 2},
    "prumerge": {"neighbours": 4},
    "prumerge-plus": {"neighbours": 4},
    "pyramiddrop": {"layers": [1, 2, 3], "keep_ratios": [0.5, 0.25, 0.125]},
    "random": {"keep": 10, "at": "vit"},
    "sparsevlm": {"layers": [0, 2], "keep": [20, 9]},
    "spatial-pooling": {"rows": 3, "columns": 4},
    "tome": {"r": 6},
    "topk": {"keep": 10},
    "visionzip": {"dominant": 8, "contextual": 4},
    "vtw": {"layer": 2},
}


def checkpoint_with(name, llava_folder, target):
    folder = shutil.copytree(llava_folder, target)
    if name == "atp":
        return add_atp(folder, PARAMETERS[name]["layers"])
    if name == "dyrate":
        return add_dyrate(folder, layer=PARAMETERS[name]["layer"])
    return write_pruning(folder, [{"method": name, "parameters": PARAMETERS[name]}])


def test_no_method_is_left_out():
    assert set(PARAMETERS) == set(METHODS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_bundle_keeps_what_torch_keeps(name, llava_folder, tmp_path):
    folder = checkpoint_with(name, llava_folder, tmp_path / "checkpoint")
    bundle = export(folder, tmp_path / "bundle")
    model = load_checkpoint(folder, dtype=torch.float32)
    backend = OnnxRuntimeBackend("cpu", 1)
    opened = Bundle.open(bundle.path)
    graphs = {graph: backend.load(opened, graph) for graph in opened.manifest.graphs}
    chain = GraphChain(opened.manifest, backend, graphs)
    guide: GuideInputs | None = None
    kept, pruned = set(), 0
    for seed in range(PROMPTS):
        num_images = 1 + seed % 3
        shape = {"num_images": num_images, "prefix": 1 + seed % 7, "suffix": 1 + seed % 11, "seed": seed}
        _, pictures = random_prompt(**shape)
        reference = model.encode_pictures(pictures)
        tower = chain.encode_pictures(pictures, Stopwatch())
        assert tower.rows.rows.tolist() == reference.rows.rows.tolist(), seed
        assert tower.rows.tokens_per_image == reference.rows.tokens_per_image, seed
        slots = reference.outputs["patch_slots"].numpy()[reference.rows.rows]
        assert chain.entering_slots(tower) == tuple(sorted(slots.tolist())), seed
        assert len(set(slots.tolist())) == len(slots), "a slot stands twice in the prompt"

        ids, _ = random_prompt(**shape, tokens_per_image=reference.rows.tokens_per_image)
        expected = model.prefill(ids, pictures, guide, tower=reference)
        logits, sequence = chain.prefill(ids, tower, guide, 4, Stopwatch())
        reports = chain.site_reports(sequence)
        assert [report.indices for report in reports] == [site.slots for site in expected.sites], seed
        assert np.abs(logits - expected.logits.numpy()).max() <= 2e-4, seed
        token = 10 + seed
        decoded = model.decode(token, expected.next_position, expected.caches, eviction=expected.eviction)
        assert np.abs(chain.decode(token, sequence, Stopwatch()) - decoded.numpy()).max() <= 2e-4, seed
        left = reports[-1].kept if reports else len(slots)
        kept.add((num_images, left))
        pruned += left < 36 * num_images
    assert pruned > PROMPTS // 2, "hardly anything was pruned"
    assert len(kept) >= 3
