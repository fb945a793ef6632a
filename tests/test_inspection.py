"""What ``inspect`` finds in real bundles, and what a person reads."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from calibrations import calibration_of
from rich.console import Console
from tiny_checkpoints import edit_json

from edgeprune.bundle import Bundle
from edgeprune.cost import DecoderShape, decoder_prefill_flops, layer_rows
from edgeprune.errors import BundleError
from edgeprune.inspection import TEXT_TOKENS, Inspection, inspect
from edgeprune.inspection_report import render_inspection
from edgeprune.json_data import from_json, to_json
from edgeprune.manifest import MANIFEST_FILE


@pytest.fixture(scope="module")
def atp(atp_bundle):
    return inspect(atp_bundle)


@pytest.fixture(scope="module")
def ivtp(ivtp_bundle):
    return inspect(ivtp_bundle)


@pytest.fixture
def atp_copy(atp_bundle, tmp_path):
    return Path(shutil.copytree(atp_bundle, tmp_path / "atp"))


def calibrate(bundle):
    """Five pictures of which the sites keep 20.4, 12.6 and 5 tokens on average."""
    kept = [[20, 20, 20, 21, 21], [12, 12, 13, 13, 13], [5, 5, 5, 5, 5]]
    manifest = Bundle.open(bundle).manifest
    context = manifest.geometry.context_length
    buckets = {"segment1": [(1, 40, 40), (41, 41, context)]}
    edit_json(bundle / MANIFEST_FILE, calibration=to_json(calibration_of(manifest, kept, buckets)))


def rendered(inspection, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_inspection(inspection))
    return console.file.getvalue()


def words(inspection):
    """The text with its spaces and line breaks reduced to single spaces."""
    return " ".join(rendered(inspection).split())


def decoder_flops(prefill):
    return sum(group.pruned_flops for group in prefill.groups[1:])


def sites_of(bundle):
    return Bundle.open(bundle).manifest.sites


# --- what is found ------------------------------------------------------------------------------------------


def test_origin_and_format(atp, atp_bundle):
    manifest = Bundle.open(atp_bundle).manifest
    assert (atp.name, atp.source.model_type, atp.dtype, atp.opset) == (
        "atp",
        "llava",
        "float32",
        manifest.opset,
    )
    assert atp.geometry == manifest.geometry
    assert atp.engines == ()


def test_methods_with_their_parameters(atp, ivtp):
    (method,) = atp.pruning
    assert (method.method, method.parameters["layers"]) == ("atp", [1, 2, 3])
    (method,) = ivtp.pruning
    assert (method.method, method.parameters["tokens_after_decoder"]) == ("ivtp", 10)


def test_sites_with_counts_or_without(atp, ivtp):
    assert [(site.place, site.keep_per_image) for site in atp.sites] == [
        ("before layer 1", None),
        ("before layer 2", None),
        ("before layer 3", None),
    ]
    assert [(site.place, site.keep_per_image) for site in ivtp.sites] == [
        ("before the MLP of layer 1", 15),
        ("before the MLP of layer 3", 10),
    ]


def test_graphs_with_tensors_and_parity(ivtp):
    graphs = {graph.name: graph for graph in ivtp.graphs}
    assert [tensor.name for tensor in graphs["segment2"].outputs] == ["logits"]
    assert graphs["site0"].outputs[0].name == "keep_indices"
    for graph in graphs.values():
        assert graph.parity is not None
        assert graph.parity.max_abs_diff < 1e-4
    assert graphs["site0"].parity.indices_identical


def test_sizes_count_every_file_once(atp, atp_bundle):
    assert atp.weights_bytes == sum(path.stat().st_size for path in atp_bundle.glob("*.data"))
    files = sum(path.stat().st_size for path in atp_bundle.iterdir())
    assert atp.total_bytes == files - (atp_bundle / MANIFEST_FILE).stat().st_size


def test_counts_that_depend_on_the_input_are_bounded_by_no_pruning(atp):
    prefill = atp.prefill
    assert prefill.counts == "unpruned bound"
    assert prefill.pruned_flops == prefill.unpruned_flops
    assert prefill.average_visual_tokens == 36
    assert [group.visual_tokens for group in prefill.groups] == [36] * 5


def test_unpruned_cost_is_that_of_the_cost_model(atp):
    shape = DecoderShape.from_geometry(atp.geometry)
    rows = layer_rows((), 4, 36, (), TEXT_TOKENS)
    assert sum(group.unpruned_flops for group in atp.prefill.groups[1:]) == decoder_prefill_flops(shape, rows)
    # Hkv·D = 16, float32, keys and values
    assert atp.prefill.unpruned_kv_cache_bytes == 4 * (36 + TEXT_TOKENS) * 2 * 16 * 4
    # Attention: 2·(32 + 32 + 16) values a row, MLP: 2·(32 + 48).
    assert atp.prefill.unpruned_activation_bytes == (36 + TEXT_TOKENS) * 160 * 4
    assert atp.prefill.pruned_activation_bytes == atp.prefill.unpruned_activation_bytes


def test_calibration_gives_real_counts(atp_copy):
    calibrate(atp_copy)
    found = inspect(atp_copy)
    assert found.prefill.counts == "calibrated"
    assert [site.mean_keep_per_image for site in found.sites] == [20.4, 12.6, 5.0]
    assert [group.visual_tokens for group in found.prefill.groups[1:]] == [36, 20, 13, 5]
    assert found.prefill.average_visual_tokens == (36 + 20 + 13 + 5) / 4
    rows = layer_rows(sites_of(atp_copy), 4, 36, [20, 13, 5], TEXT_TOKENS)
    shape = DecoderShape.from_geometry(found.geometry)
    assert decoder_flops(found.prefill) == decoder_prefill_flops(shape, rows)
    assert found.prefill.pruned_kv_cache_bytes == (36 + 20 + 13 + 5 + 4 * TEXT_TOKENS) * 2 * 16 * 4


def test_fixed_counts_between_attention_and_mlp(ivtp, ivtp_bundle):
    prefill = ivtp.prefill
    assert prefill.counts == "fixed"
    decoder = [(group.layers, group.mlp_layers, group.visual_tokens) for group in prefill.groups[1:]]
    assert decoder == [((0, 1), (0,), 20), ((2, 3), (1, 2), 15), ((), (3,), 10)]
    rows = layer_rows(sites_of(ivtp_bundle), 4, 20, [15, 10], TEXT_TOKENS)
    assert decoder_flops(prefill) == decoder_prefill_flops(DecoderShape.from_geometry(ivtp.geometry), rows)
    assert prefill.average_visual_tokens == (20 + 20 + 15 + 15) / 4
    assert prefill.groups[0].pruned_flops < prefill.groups[0].unpruned_flops


def test_it_can_be_saved_as_json(atp, ivtp):
    for inspection in (atp, ivtp):
        text = json.dumps(to_json(inspection))
        assert from_json(Inspection, json.loads(text), "inspection") == inspection


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"num_layers": 2}, {"vision_tokens": [37]}])
def test_a_geometry_that_contradicts_itself_is_refused(atp_copy, change):
    manifest = json.loads((atp_copy / MANIFEST_FILE).read_text(encoding="utf-8"))
    edit_json(atp_copy / MANIFEST_FILE, geometry=manifest["geometry"] | change)
    with pytest.raises(BundleError, match="contradicts itself"):
        inspect(atp_copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError):
        inspect(tmp_path)


# --- what a person reads ------------------------------------------------------------------------------------


def test_the_first_lines_say_what_the_bundle_is(atp):
    first = " ".join(rendered(atp).split()[:60])
    for text in ("Bundle atp", "llava, pruned by atp", "float32, ONNX opset", "4 layers", "36 enter"):
        assert text in first


def test_parameters_sites_and_graphs_are_listed(atp):
    text = words(atp)
    for part in (
        "layers 1, 2, 3",
        "site1 atp before layer 2 depends on the input",
        "past_key_values.1.key float32 [1, 2, past, 8]",
        "keep_count int64 []",
        "site0 in query.0",
    ):
        assert part in text


def test_layers_of_one_graph_share_a_line(ivtp):
    text = words(ivtp)
    assert "past_key_values.{0-1}.key float32 [1, 2, past, 8]" in text
    assert "present.{2-3}.value" in text
    assert "segment1 attention 2-3, MLP 1-2 15 " in text
    assert "segment2 MLP 3 + head 10 " in text


def test_a_site_before_layer_0_has_a_segment_without_layers_before_it(dart_bundle):
    dart = inspect(dart_bundle)
    assert [(site.place, site.keep_per_image) for site in dart.sites] == [("before layer 0", 13)]
    text = words(dart)
    assert "segment0 none 36 0 0 - segment1 0-3 + head 13 " in text
    assert "13.0 visual tokens in a decoder layer on average" in text
    assert dart.prefill.pruned_kv_cache_bytes < dart.prefill.unpruned_kv_cache_bytes


def test_a_bound_is_called_one(atp):
    text = words(atp)
    assert "Unpruned bound" in text
    assert "how many tokens are kept depends on the input" in text
    assert "segment1 1 <= 36" in text


def test_calibrated_counts_are_called_so(atp_copy):
    calibrate(atp_copy)
    text = words(inspect(atp_copy))
    assert "before layer 1 depends on the input, 20.4 on average" in text
    assert "18.5 visual tokens in a decoder layer on average; kept tokens are calibration means" in text
    assert "Unpruned bound" not in text


def test_a_calibration_is_shown_with_its_profiles(atp_copy, atp):
    calibrate(atp_copy)
    text = words(inspect(atp_copy))
    assert "calibration 5 samples, 3 skipped (sha256 777777777777)" in text
    assert "site0: visual tokens kept per picture 20 21 20.4" in text
    assert "segment1 1 40 40 1 12.50%" in text
    assert "calibration none: edgeprune calibrate" in words(atp)


def test_an_unpruned_bundle_is_called_so(atp):
    unpruned = replace(atp, pruning=(), sites=(), prefill=replace(atp.prefill, counts="fixed"))
    text = words(unpruned)
    assert "llava, unpruned" in text
    assert "Pruning: none" in text


def test_a_differing_index_stands_out(atp):
    graph = atp.graphs[-1]
    differing = replace(graph, parity=replace(graph.parity, indices_identical=False))
    assert "DIFFERENT" in rendered(replace(atp, graphs=(*atp.graphs[:-1], differing)))
    assert "DIFFERENT" not in rendered(atp)


def test_it_fits_100_columns(atp, ivtp):
    for inspection in (atp, ivtp):
        assert max(len(line.rstrip()) for line in rendered(inspection, width=300).splitlines()) <= 100


def test_it_loses_nothing_in_80_columns(ivtp):
    letters = "".join(rendered(ivtp, width=80).split())
    assert "…" not in letters
    for tensor in ivtp.graphs[-1].outputs:
        assert tensor.name in letters


def test_vision_row_is_tower_and_projector(atp):
    # The projector: 2 · 36 · (24 · 32 + 32 · 32)
    tower = atp.prefill.groups[0].unpruned_flops - 2 * 36 * (24 * 32 + 32 * 32)
    per_layer = 2 * (4 * 37 * 24**2 + 2 * 37**2 * 24 + 2 * 37 * 24 * 48)
    assert tower == 3 * per_layer
