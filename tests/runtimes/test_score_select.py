"""ScoreSelect does what the nodes did that it stands for; run by ONNX Runtime with a function in the plugin's place."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle
from edgeprune.export.exporter import export
from edgeprune.prune.fastv import FastV
from edgeprune.runtimes.onnx_operators import OperatorNode, operator_nodes
from edgeprune.runtimes.score_select import fuse_score_select


@pytest.fixture(scope="module")
def fastv(random_folder, tmp_path_factory):
    return export(
        random_folder, tmp_path_factory.mktemp("bundle") / "fastv", methods=[FastV(layer=2, keep=5)]
    )


def as_function(model):
    """ScoreSelect as a function of the two operators, whose functions the model has."""
    node = next(node for node in model.graph.node if node.op_type == "ScoreSelect")
    plugin = {"plugin_namespace": "edgeprune", "plugin_version": "1"}
    score = helper.make_node("AttentionScore", list("abcd"), ["all"], domain="edgeprune", **plugin)
    select = helper.make_node("TokenSelect", ["scores", *"ef"], ["g", "h"], domain="edgeprune", **plugin)
    for target, name, source, kind in (
        (score, "scale", "scale", onnx.AttributeProto.FLOAT),
        (score, "causal", "causal", onnx.AttributeProto.INT),
        (score, "mode", "score_mode", onnx.AttributeProto.STRING),
        (select, "mode", "mode", onnx.AttributeProto.STRING),
    ):
        target.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=source, type=kind))
    zero = helper.make_node("Constant", [], ["zero"], value_ints=[0])
    squeeze = helper.make_node("Squeeze", ["all", "zero"], ["scores"])
    body = [zero, score, squeeze, select]
    attributes = [attribute.name for attribute in node.attribute]
    opsets = list(model.opset_import)
    return helper.make_function(
        "edgeprune", "ScoreSelect", list("abcdef"), list("gh"), body, opsets, attributes
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_fused_site_chooses_the_same_rows(fastv, seed):
    path = fastv.path / "site0.onnx"
    fused = onnx.load_from_string(fuse_score_select(path.read_bytes()))
    assert operator_nodes(fused.SerializeToString()) == (OperatorNode("ScoreSelect", "topk"),)
    fused.functions.append(as_function(fused))
    rng = np.random.default_rng(seed)
    rows = 40
    inputs = {
        tensor.name: rng.standard_normal([rows if isinstance(size, str) else size for size in tensor.shape])
        for tensor in fastv.manifest.graphs["site0"].inputs
        if tensor.dtype == "float32"
    }
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    inputs[names.VISUAL_SLOTS] = np.where(rng.random(rows) < 0.7, np.arange(rows), -1)
    inputs[names.NUM_KEEP] = np.array(7 * seed)
    ours, theirs = (
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)
        for model in (fused.SerializeToString(), path.read_bytes())
    )
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one, other)
    assert sorted(theirs[0].tolist()) == list(range(rows))


def test_a_site_whose_scores_the_host_reads_keeps_them(host_bundle):
    for site in ("site0", "site1"):
        model = (host_bundle / f"{site}.onnx").read_bytes()
        assert fuse_score_select(model) == model
        assert [node.operator for node in operator_nodes(model)] == ["AttentionScore", "TokenSelect"]
        outputs = [output.name for output in onnx.load_from_string(model).graph.output]
        assert outputs == [names.KEEP_INDICES, names.KEEP_COUNT, names.SCORES]


def edited(fastv, change):
    model = onnx.load(fastv.path / "site0.onnx")
    change(model.graph)
    return model.SerializeToString()


def node_of(graph, kind):
    return next(node for node in graph.node if node.op_type == kind)


def two_scores(graph):
    weight = next(one for one in graph.initializer if one.name == node_of(graph, "AttentionScore").input[3])
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ones((2, 1), np.float32), weight.name))


def another_reader(graph):
    score = node_of(graph, "AttentionScore").output[0]
    graph.node.append(helper.make_node("Identity", [score], ["seen"]))


def score_is_an_output(graph):
    score = node_of(graph, "AttentionScore").output[0]
    graph.output.append(helper.make_tensor_value_info(score, onnx.TensorProto.FLOAT, [1, 1, None]))


def another_row(graph):
    index = next(one for one in graph.initializer if one.name == node_of(graph, "Gather").input[1])
    index.CopyFrom(onnx.numpy_helper.from_array(np.array(1), index.name))


def a_loop(graph):
    body = helper.make_graph([], "body", [], [])
    graph.node.append(helper.make_node("Loop", ["", ""], ["looped"], body=body))


def by_threshold(graph):
    next(one for one in node_of(graph, "TokenSelect").attribute if one.name == "mode").s = b"threshold"


@pytest.mark.parametrize(
    "change", [two_scores, another_reader, score_is_an_output, another_row, a_loop, by_threshold]
)
def test_what_is_not_one_score_for_one_selection_stays(fastv, change):
    model = edited(fastv, change)
    assert fuse_score_select(model) == model


def test_graphs_without_the_pair_stay(atp_bundle):
    opened = Bundle.open(atp_bundle)
    for name, graph in opened.manifest.graphs.items():
        model = opened.file(graph.file).read_bytes()
        assert fuse_score_select(model) == model, name
