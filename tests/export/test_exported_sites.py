"""Every method's site graphs under ONNX Runtime choose what the torch reference chooses, index by index."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from site_inputs import random_site_inputs

from edgeprune.checkpoint import load_checkpoint
from edgeprune.export.trace import trace_stage
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.sparsevlm import SparseVlm
from edgeprune.prune.vtw import Vtw

INPUTS = 54
"""Nine of each kind."""
LEARNED = ("atp", "dyrate")
METHODS = {
    "adaptprune": AdaptPrune(layer=2, keep=7),
    "adaptprune, normed": AdaptPrune(layer=1, keep=20, max_distance=3, key_source="normed"),
    "cdpruner": CdPruner(keep=9),
    "cdpruner, whole pictures": CdPruner(keep=10, halves=False, weighting="exponential"),
    "dart": Dart(keep=11),
    "dart, before layer 2": Dart(layer=2, keep=20, image_pivots=3),
    "fastv": FastV(layer=2, keep_ratio=0.3),
    "ivtp": Ivtp(tokens_after_vision=36, tokens_after_decoder=12, decoder_layers=3, text_selection="all"),
    "pyramiddrop": PyramidDrop(layers=(1, 3), keep_ratios=(0.5, 0.2)),
    "sparsevlm": SparseVlm(layers=(0, 2), keep=(20, 9)),
    "sparsevlm, not recycling": SparseVlm(layers=(1,), keep=(5,), recycle=False),
    "vtw": Vtw(layer=3),
}


def sites(folder, methods, dtype):
    return load_checkpoint(folder, methods=methods, dtype=dtype, fused_rotary=True).selects


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", [*LEARNED, *METHODS])
def test_kept_indices_equal_torch(name, dtype, llava_folder, request):
    folder, methods = llava_folder, [METHODS[name]] if name in METHODS else None
    if name in LEARNED:
        folder = request.getfixturevalue(f"{name}_folder")
    for stage in sites(folder, methods, dtype):
        model = ir.to_proto(trace_stage(stage, dtype, 23))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        extensions = [spec.name for spec in stage.outputs if spec.name.startswith("extended.")]
        fed = {value.name for value in session.get_inputs()}
        counts = set()
        for seed in range(INPUTS):
            inputs = random_site_inputs(stage, seed, dtype=dtype)
            with torch.no_grad():
                expected = stage(inputs)
            feed = {key: tensor.numpy() for key, tensor in inputs.items() if key in fed}
            indices, count = session.run(["keep_indices", "keep_count"], feed)
            assert count == expected["keep_count"], (stage.name, seed)
            assert indices.tolist() == expected["keep_indices"].tolist(), (stage.name, seed)
            for extended, tensor in zip(
                session.run(extensions, feed) if extensions else [], extensions, strict=True
            ):
                np.testing.assert_allclose(extended, expected[tensor].numpy(), rtol=1e-2, atol=1e-3)
            counts.add(int(count))
        assert len(counts) > 3


@pytest.mark.parametrize("grid", [(3, 8), (1, 5), (1, 1)])
@pytest.mark.parametrize("method", [CdPruner(keep=7), Dart(keep=7)], ids=["cdpruner", "dart"])
def test_sites_before_layer_0_on_any_grid(method, grid, llava_folder):
    (stage,) = sites(llava_folder, [method], torch.float32)
    model = ir.to_proto(trace_stage(stage, torch.float32, 23))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for seed in range(INPUTS):
        inputs = random_site_inputs(stage, seed, grid=grid)
        with torch.no_grad():
            expected = stage(inputs)
        indices, count = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        assert count == expected["keep_count"], seed
        assert indices.tolist() == expected["keep_indices"].tolist(), seed
