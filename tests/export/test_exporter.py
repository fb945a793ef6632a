"""The exported bundles, and what an export leaves behind when it fails or is interrupted."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

import edgeprune
from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle, sha256_of
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import BundleError, CheckpointError, ParityError, PruningError
from edgeprune.export.exporter import export
from edgeprune.export.parity import StageCase, check_graph
from edgeprune.export.passes import fold_transposed_weights
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.runtimes.session import open_session

KINDS = ("atp", "atp_float16", "ivtp", "random", "unpruned")
FUSED_OPERATORS = {"RotaryEmbedding", "RMSNormalization"}


@pytest.fixture(params=KINDS)
def bundle(request) -> Bundle:
    return Bundle.open(request.getfixturevalue(f"{request.param}_bundle"), check_all=True)


@pytest.fixture
def older(unpruned_bundle, tmp_path) -> Path:
    """A bundle at the place where the next one is to be written."""
    return Path(shutil.copytree(unpruned_bundle, tmp_path / "out" / "bundle"))


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


def beside(path: Path) -> set[str]:
    return {entry.name for entry in path.parent.iterdir()}


def answers(path: Path) -> bool:
    with open_session(path, threads=1) as session:
        return bool(session.answer([np.zeros((24, 24, 3), np.uint8)], "What is it?").token_ids)


# What is in a bundle


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
        {"vision", "embed", "segment0"},
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


def test_weights_are_not_transposed_at_run_time(bundle):
    for name, model in graphs_of(bundle).items():
        stored = {tensor.name for tensor in model.graph.initializer}
        transposed = {node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
        assert not stored & transposed, name


# The comparison with the reference


@pytest.fixture
def embed_case(tied_folder) -> StageCase:
    model = load_checkpoint(tied_folder, dtype=torch.float32)
    inputs = {
        names.INPUT_IDS: torch.tensor([[5, 3, 3, 9]]),
        names.IMAGE_FEATURES: torch.randn(2, 32, generator=torch.Generator().manual_seed(0)),
        names.IMAGE_SLOTS: torch.tensor([4, 6]),
    }
    return StageCase("a test", inputs, model.embed(inputs))


def test_graph_that_agrees(unpruned_bundle, embed_case):
    parity = check_graph(unpruned_bundle / "embed.onnx", [embed_case], torch.float32)
    assert (parity.cases, parity.indices_identical, parity.max_abs_diff) == (1, True, 0.0)
    assert check_graph(unpruned_bundle / "embed.onnx", [], torch.float32).indices_identical is None


@pytest.mark.parametrize(
    ("output", "change", "message"),
    [
        (
            names.INPUTS_EMBEDS,
            lambda t: t + 1e-2,
            r"output inputs_embeds, a test: differs from torch by 1\.00e-02",
        ),
        (names.INPUTS_EMBEDS, lambda t: t * torch.nan, "differs from torch by nan"),
        (names.INPUTS_EMBEDS, lambda t: t[:, :-1], r"shape \[1, 4, 32\], torch has \[1, 3, 32\]"),
        (names.VISUAL_SLOTS, lambda t: t + torch.tensor([0, 0, 1, 0]), "1 of 4 indices differ from torch"),
        (names.VISUAL_SLOTS, lambda t: t[:3], r"shape \[4\], torch has \[3\]"),
    ],
)
def test_graph_that_disagrees(unpruned_bundle, embed_case, output, change, message):
    wrong = replace(embed_case, outputs=embed_case.outputs | {output: change(embed_case.outputs[output])})
    with pytest.raises(ParityError, match=message):
        check_graph(unpruned_bundle / "embed.onnx", [embed_case, wrong], torch.float32)


def test_changed_weight_is_found(unpruned_bundle, embed_case, tmp_path):
    shutil.copytree(unpruned_bundle, tmp_path / "bundle")
    table = np.memmap(tmp_path / "bundle" / "embed.onnx.data", np.float32, "r+")
    table[5 * 32] += 0.01  # token 5 is in the case
    table.flush()
    with pytest.raises(ParityError, match=r"embed\.onnx, output inputs_embeds.* by 1\.00e-02"):
        check_graph(tmp_path / "bundle" / "embed.onnx", [embed_case], torch.float32)


def test_half_precision_is_compared_relative_to_the_magnitude(unpruned_bundle, embed_case):
    big = embed_case.outputs[names.INPUTS_EMBEDS] + 0.015
    wrong = replace(embed_case, outputs=embed_case.outputs | {names.INPUTS_EMBEDS: big})
    assert check_graph(unpruned_bundle / "embed.onnx", [wrong], torch.float16).max_abs_diff > 0.01
    with pytest.raises(ParityError):
        check_graph(unpruned_bundle / "embed.onnx", [wrong], torch.float32)


# Exports that fail


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "int8"}, CheckpointError, "dtype 'int8' is unknown, allowed: float32, float16"),
        ({"opset": 19}, CheckpointError, "opset 19 is out of range, allowed: 20 … 23"),
        ({"opset": 24}, CheckpointError, "opset 24"),
        ({"methods": [RandomTokens(keep=99)]}, PruningError, "a picture has 36"),
    ],
)
def test_refused_before_anything_is_written(tied_folder, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export(tied_folder, tmp_path / "new" / "bundle", **arguments)
    assert not (tmp_path / "new").exists()


def test_foreign_folder_is_refused_and_untouched(tied_folder, tmp_path):
    target = tmp_path / "out" / "photos"
    target.mkdir(parents=True)
    (target / "cat.png").write_text("meow")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        export(tied_folder, target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("cat.png", "meow")]
    assert beside(target) == {"photos"}


def test_checkpoint_is_not_overwritten(tied_folder):
    before = {path.name for path in tied_folder.iterdir()}
    with pytest.raises(BundleError, match="exists and is no bundle"):
        export(tied_folder, tied_folder)
    assert {path.name for path in tied_folder.iterdir()} == before


def test_older_bundle_is_replaced(tied_folder, older):
    (older / "left over").write_text("")
    opened = export(tied_folder, older, methods=[RandomTokens(keep=5)])
    assert opened.manifest == Bundle.open(older, check_all=True).manifest
    assert opened.manifest.geometry.tokens_per_image == 5
    assert not (older / "left over").exists()
    assert beside(older) == {"bundle"}
    assert answers(older)


@dataclass
class Interrupting:
    """Progress that interrupts the export before a step."""

    where: tuple[str, str]

    def graph(self, name: str, step: str, done: int, steps: int) -> None:  # noqa: ARG002 - the protocol's
        if (name, step) == self.where:
            raise KeyboardInterrupt


def test_interrupt_in_the_middle_leaves_the_older_bundle(tied_folder, older):
    manifest = Bundle.open(older).manifest
    with pytest.raises(KeyboardInterrupt):
        export(tied_folder, older, progress=Interrupting(("vision", "compare")))
    assert beside(older) == {"bundle"}
    assert Bundle.open(older, check_all=True).manifest == manifest
    assert answers(older)


def test_graph_that_computes_something_else_is_not_exported(tied_folder, older, monkeypatch):
    def damage(model) -> None:
        """One weight of the tower's patches is another."""
        name = next(n for n in model.graph.initializers if "patch_embedding" in n)
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array.flat[0] += 1
        value.const_value = onnx_ir_tensor(array, name)

    monkeypatch.setattr(fold_transposed_weights, "apply", damage)
    with pytest.raises(ParityError, match=r"vision\.onnx, output image_features"):
        export(tied_folder, older)
    assert beside(older) == {"bundle"}
    Bundle.open(older, check_all=True)


def onnx_ir_tensor(array, name):
    import onnx_ir

    return onnx_ir.tensor(array, name=name)


def test_full_disk(tied_folder, tmp_path):
    """A file system of 32 KiB: the weights of the vision tower do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(BundleError, match=r"No space left on device.*free disk space") as caught:
            export(tied_folder, disk / "bundle")
        assert "\n" not in str(caught.value)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit(tied_folder, older):
    """The same without root: files beyond 32 KiB are refused by the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, limits[1]))
    try:
        with pytest.raises(BundleError, match="File too large"):
            export(tied_folder, older)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert beside(older) == {"bundle"}
    Bundle.open(older, check_all=True)


def test_killed_export_is_cleared_away_by_the_next(tied_folder, tmp_path):
    """What a killed process leaves is a folder with its id; only the next export can remove it."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    abandoned = tmp_path / f".bundle.partial-{process.pid}"
    abandoned.mkdir()
    (abandoned / "vision.onnx.data").write_bytes(bytes(100))
    with pytest.raises(KeyboardInterrupt):
        export(tied_folder, tmp_path / "bundle", progress=Interrupting(("vision", "trace")))
    assert not list(tmp_path.iterdir())


def test_clip_without_tokenizer(ivtp_folder, clip_folder, tmp_path):
    """transformers would make up a tokenizer that knows no word."""
    clip = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    (clip / "tokenizer.json").unlink()
    with pytest.raises(PruningError, match="has no tokenizer: save the one of CLIP there"):
        export(ivtp_folder, tmp_path / "bundle", clip=clip)
    assert beside(tmp_path / "bundle") == {"clip"}


def test_manifest_is_plain_json(bundle):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"), parse_constant=refuse)
