"""Float16 weights on the CPU: widened while a graph runs, where float32 copies would not fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.bundle import Bundle
from edgeprune.runtimes import float16_weights
from edgeprune.runtimes.backend import open_graphs
from edgeprune.runtimes.float16_weights import copies_fit, keep_float16
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.session import open_session

LAYERS, WIDTH = 6, 1024
WEIGHT_BYTES = 2 * WIDTH * WIDTH


def save_products(folder: Path) -> Path:
    """A chain of products and a gated sum, as a decoder's MLP has them, with float16 weights in a file of their own."""
    generator = np.random.default_rng(0)
    nodes, weights = [], []
    hidden = "hidden"
    for layer in range(LAYERS):
        for name in ("gate", "up", "down"):
            weight = generator.standard_normal((WIDTH, WIDTH)).astype(np.float16) / np.float16(64)
            weights.append(numpy_helper.from_array(weight, f"{name}{layer}"))
        nodes += [
            helper.make_node("MatMul", [hidden, f"gate{layer}"], [f"g{layer}"]),
            helper.make_node("MatMul", [hidden, f"up{layer}"], [f"u{layer}"]),
            helper.make_node("Mul", [f"g{layer}", f"u{layer}"], [f"m{layer}"]),
            helper.make_node("MatMul", [f"m{layer}", f"down{layer}"], [f"d{layer}"]),
            helper.make_node("Add", [hidden, f"d{layer}"], [f"out{layer}"]),
        ]
        hidden = f"out{layer}"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", WIDTH])
        for name in ("hidden", hidden)
    ]
    graph = helper.make_graph(nodes, "products", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "products.onnx"
    onnx.save(model, path, save_as_external_data=True, location="products.onnx.data")
    return path


@pytest.fixture(scope="module")
def products(tmp_path_factory) -> Path:
    return save_products(tmp_path_factory.mktemp("products"))


def run(backend: OnnxRuntimeBackend, path: Path, *, widen_weights: bool) -> np.ndarray:
    graph = backend.open(path, widen_weights=widen_weights)
    rows = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float16)
    return backend.download(graph.run({"hidden": backend.upload(rows)}, {})[f"out{LAYERS - 1}"])


def test_both_ways_compute_the_same(products):
    """Up to the order of sums: ONNX Runtime packs weights that it holds."""
    backend = OnnxRuntimeBackend(threads=1)
    copies, kept = (run(backend, products, widen_weights=widen) for widen in (True, False))
    assert copies.dtype == kept.dtype == np.float16
    assert np.abs(copies).max() > 1
    assert np.abs(copies.astype(np.float32) - kept).max() <= 2e-3 * np.abs(copies).max()


def test_each_weight_is_widened_right_before_its_product(products, tmp_path):
    """One at a time, by ONNX Runtime's own profile."""
    options = onnxruntime.SessionOptions()
    keep_float16(onnxruntime, options)
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(products, options, providers=["CPUExecutionProvider"])
    session.run(None, {"hidden": np.ones((1, WIDTH), np.float16)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"] for event in events if event["name"].endswith("kernel_time")]
    most = widened = multiplied = 0
    for node in ran:
        widens = node["op_name"] == "Cast" and int(node["output_size"]) == 2 * WEIGHT_BYTES
        multiplies = node["op_name"] in ("MatMul", "Gemm")
        widened += widens
        multiplied += multiplies
        most = max(most, widened - multiplied)
    # As many as products: none reads a copy that was made when the graph was opened.
    assert widened == multiplied == 3 * LAYERS
    assert most == 1


def test_copies_have_to_fit_the_free_memory(atp_float16_bundle, monkeypatch):
    manifest = Bundle.open(atp_float16_bundle).manifest
    weights = sum(file.stat().st_size for file in atp_float16_bundle.glob("*.data"))
    for available, fit in ((None, True), (int(2.6 * weights), True), (int(2.4 * weights), False), (0, False)):
        monkeypatch.setattr(float16_weights, "available_bytes", lambda available=available: available)
        assert copies_fit(manifest) is fit
        # Of float32 weights there are no copies.
        assert copies_fit(replace(manifest, dtype="float32"))
    monkeypatch.undo()
    assert copies_fit(manifest)


def test_a_session_answers_alike_either_way(atp_float16_bundle, monkeypatch):
    opened, answers = [], []
    original = OnnxRuntimeBackend.open

    def open_(self, path, provider_options=None, *, widen_weights=True):
        opened.append(widen_weights)
        return original(self, path, provider_options, widen_weights=widen_weights)

    monkeypatch.setattr(OnnxRuntimeBackend, "open", open_)
    for available in (1 << 40, 0):
        monkeypatch.setattr(float16_weights, "available_bytes", lambda available=available: available)
        with open_session(atp_float16_bundle, threads=1) as session:
            answers.append(session.answer([], "What is this?"))
    graphs = len(Bundle.open(atp_float16_bundle).manifest.graphs)
    assert opened == [True] * graphs + [False] * graphs
    assert answers[0].token_ids == answers[1].token_ids


def test_the_decision_is_made_once_per_bundle(atp_float16_bundle, monkeypatch):
    """Opening graphs takes memory: the later ones must not be opened another way."""
    asked = []

    def available() -> int:
        asked.append(None)
        return (1 << 40) if len(asked) == 1 else 0

    monkeypatch.setattr(float16_weights, "available_bytes", available)
    backend, bundle = OnnxRuntimeBackend(threads=4), Bundle.open(atp_float16_bundle)
    assert backend.loads_at_once == 4
    open_graphs(bundle, backend)
    open_graphs(bundle, backend)
    assert len(asked) == 1
