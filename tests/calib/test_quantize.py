"""A quantized bundle computes what its codes and scales say, prunes as before, and is whole or not there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from tiny_checkpoints import TinyLlava, build_llava, write_pruning

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.calib.agreement import jaccard
from edgeprune.calib.graph_quantizer import quantize_graph
from edgeprune.calib.quantization_options import QuantizationOptions
from edgeprune.calib.quantize import quantize
from edgeprune.calib.recorded_inputs import RecordedInputs
from edgeprune.calib.weight_products import deciding_products, gemms_as_products, weight_products
from edgeprune.cli import main
from edgeprune.errors import BundleError, DataError, EngineError, QuantizationError, TargetError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.export.exporter import export
from edgeprune.inspection import inspect
from edgeprune.manifest import MANIFEST_FILE, manifest_from_json, manifest_to_json
from edgeprune.quantization_entry import FP8, INT4, INT8, ONNXRUNTIME, TENSORRT
from edgeprune.runtimes.engine_precision import engine_precision
from edgeprune.targets import find_target

# One worker quantizes, the bundles are shared.
pytestmark = pytest.mark.xdist_group("quantize")

# Wide enough for blocks of 64, and deep enough for a layer behind the site.
WIDE = TinyLlava(
    layers=3,
    hidden_size=64,
    head_dim=16,
    intermediate_size=128,
    vision_layers=2,
    vision_hidden=64,
    tied=True,
    std=0.1,
)
SAMPLES, BLOCK = 8, 64
QUESTION = "What is in the picture?"
VARIANTS = [
    (ONNXRUNTIME, INT8, INT8),
    (ONNXRUNTIME, INT4, None),
    (TENSORRT, INT8, INT8),
    (TENSORRT, INT4, INT4),
    (TENSORRT, FP8, FP8),
]
# Of float16, with float32 scales: one per block of 64 rows, or per column of 64 or 128.
SIZES = {INT8: 0.57, INT4: 0.30, FP8: 0.57}


def options_of(form: str, decoder: str | None, vision: str | None, **more: Any) -> QuantizationOptions:
    return QuantizationOptions(
        decoder, vision, form, block_size=BLOCK, samples=SAMPLES, max_new_tokens=3, threads=1, **more
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, picture in enumerate(check_pictures(SAMPLES)):
        picture.save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A bundle that keeps twelve tokens before layer 2, by the attention of layer 1."""
    checkpoint = build_llava(tmp_path_factory.mktemp("checkpoint") / "wide", WIDE)
    write_pruning(checkpoint, [{"method": "fastv", "parameters": {"layer": 2, "keep": 12}}])
    return export(checkpoint, tmp_path_factory.mktemp("bundle") / "wide").path


@pytest.fixture(scope="module")
def made(plain, data, tmp_path_factory):
    """Quantized bundles, each made once."""
    found: dict[tuple[str, str, str | None], Bundle] = {}

    def make(form: str, decoder: str, vision: str | None) -> Bundle:
        key = (form, decoder, vision)
        if key not in found:
            output = tmp_path_factory.mktemp("quantized") / "bundle"
            found[key] = quantize(plain, output, data, options_of(*key), prompt=QUESTION)
        return found[key]

    return make


def loaded(bundle: Bundle | Path, graph: str) -> Any:
    folder = bundle if isinstance(bundle, Path) else bundle.path
    return onnx.load(str(folder / f"{graph}.onnx"))


def weights_of(plain: Path, graph: str) -> dict[str, np.ndarray]:
    """The weights of the graph's products, by name of the weight."""
    model = loaded(plain, graph)
    gemms_as_products(model)
    return {weight.name: numpy_helper.to_array(weight) for _, weight in weight_products(model)}


@pytest.mark.parametrize(("form", "decoder", "vision"), VARIANTS)
def test_a_quantized_bundle_answers_and_prunes_as_before(made, plain, data, form, decoder, vision):
    bundle = made(form, decoder, vision)
    entry = bundle.manifest.quantization
    assert manifest_from_json(bundle.path / MANIFEST_FILE) == bundle.manifest
    assert (entry.form, entry.samples) == (form, SAMPLES)
    for part, precision in ((entry.decoder, decoder), (entry.vision, vision)):
        assert (None if part is None else part.precision) == precision
        if part is not None:
            assert part.bytes <= SIZES[precision] * part.fp16_bytes
    # Three layers of seven products and the head, without query and key of the layer whose attention is scored.
    assert (entry.decoder.products, entry.decoder.kept_products) == (20, 2)
    report = entry.report
    assert report.bundle_bytes == sum(file.bytes for file in bundle.manifest.files())
    with (
        edgeprune.open_session(plain, threads=1) as before,
        edgeprune.open_session(bundle.path, threads=1) as after,
    ):
        pairs = [
            [
                session.answer([path], QUESTION, edgeprune.SamplingOptions(max_new_tokens=3))
                for session in (before, after)
            ]
            for path in sorted(data.iterdir())
        ]
    assert report.answer_agreement == np.mean([one.token_ids == two.token_ids for one, two in pairs])
    assert report.kept_agreement == {
        "site0": pytest.approx(
            np.mean([jaccard(one.sites[0].indices, two.sites[0].indices) for one, two in pairs])
        )
    }
    assert all(two.sites[0].kept == 12 for _, two in pairs)
    # INT4 in the tower of a random model changes the scores most; twelve of 36 at random have 0.2.
    assert report.kept_agreement["site0"] > (0.5 if vision == INT4 else 0.75)


@pytest.mark.parametrize(("form", "decoder", "vision"), VARIANTS)
def test_outputs_stay_near_those_of_the_unquantized_segment(made, plain, form, decoder, vision):
    feed = {
        "hidden_states": np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float32),
        "position_ids": np.arange(9)[None],
        "past_key_values.2.key": np.zeros((1, 2, 0, 16), np.float32),
        "past_key_values.2.value": np.zeros((1, 2, 0, 16), np.float32),
    }

    def logits(folder: Path) -> np.ndarray:
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.disable_quant_qdq", "1" if decoder == FP8 else "0")
        session = onnxruntime.InferenceSession(str(folder / "segment1.onnx"), settings)
        return session.run(["logits"], feed)[0]

    expected, found = logits(plain), logits(made(form, decoder, vision).path)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    # Drawn hidden states are no calibration data: static ranges clip some of them.
    assert 0 < error < {INT8: 0.1, INT4: 0.2, FP8: 0.15}[decoder]


@pytest.mark.parametrize("precision", [INT8, INT4, FP8])
def test_codes_and_scales_give_the_weights_back(made, plain, precision):
    model = loaded(made(TENSORRT, precision, precision), "segment1")
    expected = weights_of(plain, "segment1")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    checked = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        name = max((name for name in expected if node.input[0].startswith(name)), key=len)
        codes, scales = tensors[node.input[0]].astype(np.float32), tensors[node.input[1]]
        weight = expected[name]
        if precision == INT4:
            assert scales.shape == (weight.shape[0] // BLOCK, weight.shape[1])
            step = np.repeat(np.abs(scales), BLOCK, axis=0)
            restored = codes * np.repeat(scales, BLOCK, axis=0)
            # The code 8 does not exist: what would have it is off by up to a whole step.
            allowed = np.where(codes == 7, step, step / 2)
        else:
            assert scales.shape == (weight.shape[1],)
            restored = codes * scales
            # E4M3 has three bits behind the first, and steps of 2⁻⁹ around 0.
            allowed = scales / 2 if precision == INT8 else np.maximum(np.abs(weight) / 16, scales * 2.0**-10)
            np.testing.assert_allclose(
                np.abs(restored).max(axis=0), np.abs(weight).max(axis=0), rtol=1e-2, err_msg=name
            )
        assert (np.abs(restored - weight) <= allowed * 1.001 + 1e-7).all(), name
        checked += 1
    assert checked == 8


def test_ranges_of_activations_are_those_of_the_samples(made, plain, data):
    """The scale before the first product of the last segment is the largest magnitude seen there, by 127 or 448."""
    largest = 0.0

    class Recording:
        def __init__(self, graph):
            self.graph = graph

        def run(self, inputs, outputs):
            nonlocal largest
            feed = {name: session.backend.download(tensor) for name, tensor in inputs.items()}
            largest = max(largest, float(np.abs(probe.run(None, {n: feed[n] for n in needed})[0]).max()))
            return self.graph.run(inputs, outputs)

    model = loaded(plain, "segment1")
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(product.input[0]))
    probe = onnxruntime.InferenceSession(model.SerializeToString())
    needed = [value.name for value in probe.get_inputs()]
    with edgeprune.open_session(plain, threads=1) as session:
        session._chain.graphs["segment1"] = Recording(session._chain.graphs["segment1"])
        for path in sorted(data.iterdir()):
            session.answer([path], QUESTION, edgeprune.SamplingOptions(max_new_tokens=3))
    for precision, steps in ((INT8, 127), (FP8, 448)):
        quantized = loaded(made(TENSORRT, precision, precision), "segment1")
        first = next(
            node
            for node in quantized.graph.node
            if node.op_type == "QuantizeLinear" and node.input[0] == product.input[0]
        )
        scale = next(tensor for tensor in quantized.graph.initializer if tensor.name == first.input[1])
        assert float(numpy_helper.to_array(scale).item()) == pytest.approx(largest / steps, rel=1e-3)


def test_what_decides_which_tokens_are_kept_is_left_as_it_is(made, plain, ivtp_bundle, combined_bundle):
    def deciding(bundle: Path, graph: str) -> set[str]:
        manifest = Bundle.open(bundle).manifest
        model = onnx.load(str(bundle / f"{graph}.onnx"))
        read = {tensor.name for site in manifest.sites for tensor in manifest.graphs[site.graph].inputs}
        names = {node.name: weight.name for node, weight in weight_products(model)}
        return {
            names[name].partition("layers.")[2].removesuffix(".weight.transposed")
            for name in deciding_products(model, read)
        }

    assert deciding(plain, "segment0") == {"1.self_attn.q_proj", "1.self_attn.k_proj"}
    assert deciding(plain, "segment1") == deciding(plain, "vision") == set()
    # Two groups of layers: attention of the class token, and norms of the values of each group's last layer.
    attention = {f"{layer}.self_attn.{x}_proj" for layer in range(3) for x in "qk"}
    assert deciding(ivtp_bundle, "vision") == attention | {"1.self_attn.v_proj", "2.self_attn.v_proj"}
    # AdaptPrune before layer 1 reads layer 0; PyramidDrop projects hidden states with weights of its own graph.
    assert deciding(combined_bundle, "segment0") == {"0.self_attn.q_proj", "0.self_attn.k_proj"}
    assert deciding(combined_bundle, "segment1") == set()
    for variant in VARIANTS:
        untouched = {tensor.name: tensor for tensor in loaded(made(*variant), "segment0").graph.initializer}
        for name, weight in weights_of(plain, "segment0").items():
            if "layers.1.self_attn.q_proj" in name or "layers.1.self_attn.k_proj" in name:
                np.testing.assert_array_equal(numpy_helper.to_array(untouched[name]), weight)
            else:
                assert name not in untouched


def test_sites_and_embeddings_are_the_same_and_stored_once(made, plain):
    bundle = made(ONNXRUNTIME, INT4, None)
    for graph in ("site0", "gather", "embed", "vision"):
        before = {t.name: numpy_helper.to_array(t) for t in loaded(plain, graph).graph.initializer}
        after = {t.name: numpy_helper.to_array(t) for t in loaded(bundle, graph).graph.initializer}
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert graph in bundle.manifest.parity
    assert "segment0" not in bundle.manifest.parity
    operators = [node.op_type for node in loaded(bundle, "segment1").graph.node]
    assert operators.count("MatMulNBits") == 8
    assert not {"MatMul", "Gemm"} & set(operators)


def test_a_gemm_is_a_product_and_a_sum(plain):
    model = loaded(plain, "projector")
    assert any(node.op_type == "Gemm" for node in model.graph.node)
    rng = np.random.default_rng(1)
    feed = {
        "patch_features": rng.standard_normal((36, 64)).astype(np.float32),
        "patch_slots": np.arange(36),
        "feature_rows": np.arange(36),
    }
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    gemms_as_products(model)
    assert not any(node.op_type == "Gemm" for node in model.graph.node)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": None}, "nothing to quantize"),
        ({"decoder": "int2"}, "precision 'int2' is unknown, known: int8, int4, fp8"),
        ({"vision": FP8}, "computes no FP8 on the CPU: choose int8 or int4, or the form tensorrt"),
        ({"form": "openvino"}, "form 'openvino' is unknown"),
        ({"block_size": 48}, "blocks of 48 weights do not exist"),
        ({"samples": 7}, "7 samples are too few to calibrate: give 8 or more"),
        ({"threads": 0}, "start at 1"),
    ],
)
def test_options_check_themselves(settings, message):
    with pytest.raises(QuantizationError, match=message) as caught:
        QuantizationOptions(**settings)
    assert "\n" not in str(caught.value)


def test_bundles_that_cannot_be_quantized_so(plain, made, tmp_path):
    manifest = Bundle.open(plain).manifest
    half = replace(manifest, dtype="float16")
    for refused, settings, message in (
        (half, {}, "export with --dtype float32"),
        (
            replace(manifest, opset=20),
            {"decoder": INT4, "form": TENSORRT},
            "export with --opset 21 or higher",
        ),
        (made(ONNXRUNTIME, INT4, None).manifest, {}, "quantized already"),
    ):
        with pytest.raises(QuantizationError, match=message):
            QuantizationOptions(**settings).check(refused)
    with pytest.raises(QuantizationError, match="is the bundle itself"):
        quantize(plain, plain, tmp_path, QuantizationOptions())


def test_data_that_is_missing_unreadable_or_too_little(plain, data, tmp_path):
    for path, content, message in (
        ("missing.jsonl", None, "does not exist: give a JSONL file"),
        ("empty.jsonl", "", "holds no samples"),
        ("broken.jsonl", "{\n", "line 1: no JSON"),
        (
            "few.jsonl",
            json.dumps({"image": str(data / "0.png"), "prompt": "?"}),
            "1 usable samples are too few",
        ),
    ):
        if content is not None:
            (tmp_path / path).write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            quantize(plain, tmp_path / "out", tmp_path / path, options_of(ONNXRUNTIME, INT8, None))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_and_ranges_that_are_not_finite(plain, tmp_path):
    model = loaded(plain, "segment1")
    for tensor in model.graph.initializer:
        if "layers.2.mlp.up_proj" in tensor.name:
            values = numpy_helper.to_array(tensor).copy()
            values[3, 5] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(tmp_path / "segment1.onnx"))
    with pytest.raises(
        QuantizationError, match=r"segment1\.onnx: the weights of .* hold NaN or infinity"
    ) as caught:
        quantize_graph(
            tmp_path / "segment1.onnx", INT4, options_of(ONNXRUNTIME, INT4, None), (), None, tmp_path
        )
    assert "\n" not in str(caught.value)
    inputs = RecordedInputs(tmp_path, "segment1")
    empty = np.zeros((1, 2, 0, 16), np.float32)
    inputs.add(
        {
            "hidden_states": np.full((1, 4, 64), np.nan, np.float32),
            "position_ids": np.arange(4)[None],
            "past_key_values.2.key": empty,
            "past_key_values.2.value": empty,
        }
    )
    for precision in (INT8, FP8):
        scratch = tmp_path / precision
        scratch.mkdir()
        with pytest.raises(QuantizationError, match=r"segment1\.onnx: .* not finite") as caught:
            quantize_graph(
                plain / "segment1.onnx", precision, options_of(TENSORRT, precision, None), (), inputs, scratch
            )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", ["samples", "segment1", "compare"])
def test_what_is_interrupted_leaves_nothing(plain, data, tmp_path, at):
    class Stop:
        def graph(self, name, *_):
            if name == at:
                raise KeyboardInterrupt

        def bad(self, sample):
            raise AssertionError(sample)

    with pytest.raises(KeyboardInterrupt):
        quantize(
            plain,
            tmp_path / "out",
            data,
            options_of(ONNXRUNTIME, INT8, None),
            prompt=QUESTION,
            progress=Stop(),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_report_and_one_line_for_an_error(plain, data, tmp_path):
    arguments = [
        "quantize",
        str(plain),
        "-o",
        str(tmp_path / "out"),
        "--data",
        str(data),
        "--prompt",
        QUESTION,
    ]
    arguments += ["--samples", "8", "--max-new-tokens", "2", "--block-size", "64", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, "--decoder", "int4"])
    assert result.exit_code == 0, result.output
    for words in (
        "weight-only, blocks of 64",
        "same answer",
        "kept tokens, site0",
        "Jaccard",
        "time of prefill",
    ):
        assert words in result.stdout
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert "quantized" in result.stdout
    assert "int4" in result.stdout
    assert inspect(tmp_path / "out").quantization == Bundle.open(tmp_path / "out").manifest.quantization
    result = CliRunner().invoke(main, [*arguments, "--decoder", "fp8"])
    assert result.exit_code == 1
    assert result.stderr.startswith("edgeprune: ONNX Runtime computes no FP8")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--checkpoint", str(plain)])
    assert "a quantized bundle differs from its checkpoint" in result.stderr


def test_engines_have_the_bundles_precision_or_none(made, plain):
    card, old = find_target("rtx40"), find_target("rtx30")
    mixed = made(TENSORRT, INT4, INT4).manifest
    mixed = replace(
        mixed,
        quantization=replace(
            mixed.quantization, vision=made(TENSORRT, INT8, INT8).manifest.quantization.vision
        ),
    )
    assert engine_precision(mixed, card) == engine_precision(mixed, old, INT4) == INT4
    floating = made(TENSORRT, FP8, FP8).manifest
    assert engine_precision(floating, card) == FP8
    with pytest.raises(TargetError, match="has no fp8: choose"):
        engine_precision(floating, old)
    with pytest.raises(EngineError, match="build the one that it was made from for fp32 engines"):
        engine_precision(floating, card, "fp32")
    with pytest.raises(EngineError, match=r"quantized with operators of ONNX Runtime, .* --for tensorrt"):
        engine_precision(made(ONNXRUNTIME, INT8, INT8).manifest, card)


def test_an_entry_that_contradicts_itself_is_refused(made, tmp_path):
    manifest = made(ONNXRUNTIME, INT4, None).manifest
    for change in (
        {"form": "other"},
        {"decoder": None},
        {"samples": 0},
        {"report": {"answer_agreement": 1.5}},
        {"decoder": {"precision": "int3"}},
        {"unknown": 1},
    ):
        text = json.loads(manifest_to_json(manifest))
        for key, value in change.items():
            whole = text["quantization"]
            if isinstance(value, dict):
                whole[key].update(value)
            else:
                whole[key] = value
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(text))
        with pytest.raises(BundleError, match="quantiz"):
            manifest_from_json(tmp_path / MANIFEST_FILE)


def test_tensorrt_builds_what_is_quantized_for_it(made, tmp_path):
    """Built for a card that has all three, not executed."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is in the extra 'dev' on x86-64 Linux")
    from edgeprune.runtimes.engine_builder import build_engine
    from edgeprune.runtimes.engine_profiles import ONE, Limits, profiles
    from edgeprune.runtimes.tensorrt_library import library_for

    card = find_target("rtx40")
    for precision in (INT8, INT4, FP8):
        bundle = made(TENSORRT, precision, precision)
        manifest = bundle.manifest
        entries = profiles(manifest, Limits.of(manifest), ONE)
        for name in ("projector", "segment1"):
            graph = manifest.graphs[name]
            engine = build_engine(
                library_for(card), bundle.file(graph.file), graph, entries[name], sm=card.sm
            )
            assert engine.data.nbytes > 10_000


def test_a_copied_bundle_runs_elsewhere(made, tmp_path):
    """Data files are found beside the graphs, wherever these lie."""
    copy = Path(shutil.copytree(made(ONNXRUNTIME, INT8, INT8).path, tmp_path / "copy"))
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]
    edgeprune.open_session(copy).close()
