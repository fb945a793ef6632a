"""The exported bundles, and what an export leaves behind when it fails or is interrupted."""

import json
import sys
from pathlib import Path

import onnx
import pytest
from safetensors import safe_open

import edgeprune
from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle, sha256_of
from edgeprune.export.exporter import export
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.prune.adaptprune import AdaptPrune

KINDS = ("atp", "atp_float16", "ivtp", "random", "unpruned")
FUSED_OPERATORS = {"RotaryEmbedding", "RMSNormalization"}


@pytest.fixture(params=KINDS)
def bundle(request) -> Bundle:
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle"), check_all=True)


def graphs_of(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    return {
        name: onnx.load(bundle.file(entry.file), load_external_data=False)
        for name, entry in bundle.manifest.graphs.items()
    }


def external_tensors(bundle: Bundle) -> dict[tuple[str, int], tuple[str, int]]:
    """(file, offset) → (name, bytes) of the weights of all graphs, each once."""
    found = {}
    for model in graphs_of(bundle).values():
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                found[place["location"], int(place["offset"])] = (tensor.name, int(place["length"]))
    return found


def checkpoint_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """All nodes, those of functions and of branches included."""
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    nodes = []
    while pending:
        node = pending.pop()
        nodes.append(node)
        pending += [inner for attribute in node.attribute for inner in attribute.g.node]
    return nodes


def test_graphs_are_valid_and_take_what_the_manifest_says(bundle):
    elements = {1: "float32", 7: "int64", 10: "float16"}
    for name, entry in bundle.manifest.graphs.items():
        onnx.checker.check_model(str(bundle.file(entry.file)), full_check=True)
        model = onnx.load(bundle.file(entry.file), load_external_data=False)
        for values, expected in ((model.graph.input, entry.inputs), (model.graph.output, entry.outputs)):
            actual = [
                (
                    value.name,
                    elements[value.type.tensor_type.elem_type],
                    tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                )
                for value in values
            ]
            listed = [(tensor.name, tensor.dtype, tensor.shape) for tensor in expected]
            assert actual == listed, name
        (standard,) = [entry.version for entry in model.opset_import if entry.domain == ""]
        assert standard == bundle.manifest.opset


def test_every_file_is_in_the_manifest(bundle):
    listed = {entry.path for entry in bundle.manifest.files()}
    assert {path.name for path in bundle.path.iterdir()} == listed | {MANIFEST_FILE}
    for entry in bundle.manifest.files():
        assert (sha256_of(bundle.file(entry)), bundle.file(entry).stat().st_size) == (
            entry.sha256,
            entry.bytes,
        )


def test_parity_was_measured_on_every_graph(bundle):
    manifest = bundle.manifest
    assert set(manifest.parity) == set(manifest.graphs)
    accepted = 1e-4 if manifest.dtype == "float32" else 2e-2
    for name, parity in manifest.parity.items():
        has_indices = any(tensor.dtype == "int64" for tensor in manifest.graphs[name].outputs)
        assert parity.cases >= (3 if name.startswith("segment") or name == "embed" else 2)
        assert parity.tolerance == accepted
        assert 0 <= parity.max_abs_diff < 1
        assert parity.indices_identical is (True if has_indices else None)
    sites = [site.graph for site in manifest.sites]
    assert all(manifest.parity[site].indices_identical for site in sites)


def test_manifest_describes_the_model(atp_bundle, ivtp_bundle, random_bundle, unpruned_bundle, atp_folder):
    atp, ivtp, random, unpruned = (
        Bundle.open(path).manifest for path in (atp_bundle, ivtp_bundle, random_bundle, unpruned_bundle)
    )
    assert [segment.layers for segment in atp.segments] == [(0,), (1,), (2,), (3,)]
    assert [(site.graph, site.layer, site.before_mlp, site.keep_per_image) for site in atp.sites] == [
        ("site0", 1, False, None),
        ("site1", 2, False, None),
        ("site2", 3, False, None),
    ]
    assert (atp.geometry.grid, atp.geometry.tokens_per_image, atp.geometry.vision_tokens) == (
        (6, 6),
        36,
        (37,) * 3,
    )
    assert (atp.source.name, atp.source.model_type) == ("atp", "llava")
    files = [
        atp_folder / name
        for name in ("config.json", "model.safetensors", "pruning.json", "pruning.safetensors")
    ]
    assert atp.source.sha256 == sha256_of(*files)
    assert atp.edgeprune_version == edgeprune.__version__
    assert atp.probe is None
    hidden = atp.graphs["segment1"].inputs[0]
    assert (hidden.name, hidden.dtype, hidden.shape) == (names.HIDDEN_STATES, "float32", (1, "sequence", 32))
    past = atp.graphs["segment1"].inputs[2]
    assert (past.name, past.shape) == (names.past_key(1), (1, 2, "past", 8))
    assert atp.graphs["site0"].outputs[0].shape == ("sequence",)

    assert [(segment.layers, segment.mlp_layers) for segment in ivtp.segments] == [
        ((0, 1), (0,)),
        ((2, 3), (1, 2)),
        ((), (3,)),
    ]
    assert [(site.layer, site.before_mlp, site.keep_per_image) for site in ivtp.sites] == [
        (1, True, 15),
        (3, True, 10),
    ]
    assert ivtp.geometry.tokens_per_image == 20
    assert ivtp.geometry.vision_tokens[-1] <= 37
    assert ivtp.probe is not None
    assert (ivtp.probe.guided, ivtp.probe.guide_context_length) == (True, 77)

    assert (random.pruning[0].method, random.pruning[0].parameters["keep"]) == ("random", 9)
    assert (random.geometry.tokens_per_image, random.sites, len(random.segments)) == (9, (), 1)
    assert (unpruned.pruning, unpruned.sites, set(unpruned.graphs)) == (
        (),
        (),
        {"vision", "projector", "embed", "segment0"},
    )


def test_dtype(atp_float16_bundle, atp_bundle):
    half, single = Bundle.open(atp_float16_bundle), Bundle.open(atp_bundle)
    assert (half.manifest.dtype, single.manifest.dtype) == ("float16", "float32")
    for bundle, floats in ((half, onnx.TensorProto.FLOAT16), (single, onnx.TensorProto.FLOAT)):
        for name in ("vision", "embed", "segment0", "segment3"):
            model = graphs_of(bundle)[name]
            large = {
                t.data_type for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
            }
            assert large == {floats}, name


def test_operators_are_functions_that_name_their_plugin(atp_bundle, ivtp_bundle):
    seen = set()
    for path in (atp_bundle, ivtp_bundle):
        for name, model in graphs_of(Bundle.open(path)).items():
            functions = {(function.domain, function.name): function for function in model.functions}
            ours = [node for node in model.graph.node if node.domain == "edgeprune"]
            assert {(node.domain, node.op_type) for node in ours} == set(functions), name
            assert not ours or name.startswith(("site", "gather", "guide", "vision"))
            for node in ours:
                seen.add(node.op_type)
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"edgeprune", b"1")
                function = functions[node.domain, node.op_type]
                declared = {*function.attribute, *(proto.name for proto in function.attribute_proto)}
                assert {"plugin_namespace", "plugin_version"} <= declared
    assert {"AttentionScore", "TokenSelect"} <= seen


def test_opset_20_has_no_operators_of_later_opsets(random_bundle, unpruned_bundle):
    used = {
        node.op_type for model in graphs_of(Bundle.open(random_bundle)).values() for node in nodes_of(model)
    }
    for operator in used:
        onnx.defs.get_schema(operator, 20, "")
    assert not used & FUSED_OPERATORS
    later = {
        node.op_type for model in graphs_of(Bundle.open(unpruned_bundle)).values() for node in nodes_of(model)
    }
    assert later >= FUSED_OPERATORS


def test_nothing_tells_where_it_was_made(bundle):
    places = [
        str(bundle.path.parent),
        str(Path(edgeprune.__file__).resolve().parents[1]),
        sys.prefix,
        str(Path.home()),
        "site-packages",
        "stack_trace",
        "Traceback",
        'File "',
        ".py",
    ]
    for path in [*bundle.path.glob("*.onnx"), bundle.path / MANIFEST_FILE]:
        content = path.read_bytes()
        assert [place for place in places if place.encode() in content] == [], path.name
    for name, model in graphs_of(bundle).items():
        assert model.producer_name == "edgeprune"
        assert not model.doc_string, name
        assert not model.metadata_props, name
        assert not any(node.doc_string or node.metadata_props for node in nodes_of(model)), name


def test_weights_can_be_mapped(bundle):
    """External, each on its own page, within its file."""
    tensors = external_tensors(bundle)
    for (file, offset), (name, length) in tensors.items():
        assert offset % 4096 == 0, name
        assert offset + length <= (bundle.path / file).stat().st_size, name
    for name, model in graphs_of(bundle).items():
        inline = [t.name for t in model.graph.initializer if len(t.raw_data) >= 1024]
        assert inline == [], name
    spans = sorted((file, offset, offset + length) for (file, offset), (_, length) in tensors.items())
    for (file, _, end), (next_file, start, _) in zip(spans[:-1], spans[1:], strict=True):  # noqa: RUF007
        assert file != next_file or end <= start


@pytest.mark.parametrize("kind", ["atp", "random", "unpruned"])
def test_weights_are_stored_once(kind, request):
    bundle = Bundle.open(request.getfixturevalue(f"{kind}_bundle"))
    folder = request.getfixturevalue("tied_folder" if kind == "unpruned" else f"{kind}_folder")
    stored = sum(length for _, length in external_tensors(bundle).values())
    checkpoint = checkpoint_bytes(folder)
    # The last layer of the tower does not run.
    assert 0.7 * checkpoint < stored <= 1.02 * checkpoint


def test_tied_embeddings_are_shared(unpruned_bundle):
    bundle = Bundle.open(unpruned_bundle)
    vocabulary = bundle.manifest.geometry.vocab_size * bundle.manifest.geometry.hidden_size * 4
    tables = [key for key, (_, length) in external_tensors(bundle).items() if length == vocabulary]
    assert tables == [("embed.onnx.data", 0)]
    files = [entry.path for entry in bundle.manifest.graphs["segment0"].data]
    assert sorted(files) == ["embed.onnx.data", "segment0.onnx.data"]
    head = graphs_of(bundle)["segment0"].graph.node[-1]
    (location,) = [
        entry.value
        for tensor in graphs_of(bundle)["segment0"].graph.initializer
        if tensor.name in head.input
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    assert location == "embed.onnx.data"


def test_a_site_shares_the_decoders_weights(tied_folder, tmp_path):
    """AdaptPrune's site projects keys with the next layer's own weights."""
    bundle = export(tied_folder, tmp_path / "bundle", methods=[AdaptPrune(layer=1, keep=5)])
    entry = bundle.manifest.graphs["site0"]
    assert [file.path for file in entry.data] == ["segment1.onnx.data"]
    assert not (bundle.path / "site0.onnx.data").exists()


def test_weights_are_not_transposed_at_run_time(bundle):
    for name, model in graphs_of(bundle).items():
        stored = {tensor.name for tensor in model.graph.initializer}
        transposed = {node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
        assert not stored & transposed, name


def test_manifest_is_plain_json(bundle):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"), parse_constant=refuse)
