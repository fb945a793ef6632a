"""Memory: weights are counted as the graphs read them, and what is named as a remedy is one."""

import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from tiny_manifest import with_deepstack

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.runtimes.engine_memory import MemoryModel, check_buildable
from edgeprune.runtimes.engine_profiles import Limits
from edgeprune.runtimes.external_weights import external_bytes
from edgeprune.runtimes.memory_remedies import check_fits
from edgeprune.targets import GIB, find_target

ORIN = find_target("orin-nano-4")


@pytest.fixture
def model(ivtp_bundle: Path) -> MemoryModel:
    bundle = Bundle.open(ivtp_bundle)
    segments = {segment.graph: 2 for segment in bundle.manifest.segments}
    return MemoryModel.of(bundle, Limits.of(bundle.manifest), segments)


@pytest.mark.parametrize(
    "bundle", ["ivtp_bundle", "combined_bundle", "atp_float16_bundle", "unpruned_bundle"]
)
def test_a_graph_has_the_weights_that_it_reads(bundle, request):
    """Not those of the whole file, which another graph may share: the projector of IVTP, AdaptPrune's site, tied
    embeddings.
    """
    opened = Bundle.open(request.getfixturevalue(bundle))
    found, expected = {}, {}
    for name, graph in opened.manifest.graphs.items():
        path = opened.file(graph.file)
        found[name] = external_bytes(path)
        proto = onnx.load(path, load_external_data=False)
        entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
        expected[name] = sum(int(entry.value) for entry in entries if entry.key == "length")
    assert found == expected
    assert found["segment0"] > 0


def test_deepstacks_features_take_memory_of_the_sequence(model):
    """What the decoder adds behind two layers lies there from the embedding on."""
    more = replace(model, manifest=with_deepstack(model.manifest, 2))
    features = 2 * model.limits.sequence * model.manifest.geometry.hidden_size * model.bytes_per_value
    assert more.estimate().activations == model.estimate().activations + features


def test_what_fits_is_not_refused(model):
    check_fits(model, ORIN, model.estimate().run)
    with pytest.raises(EngineError, match=r"0\.00 GiB too little"):
        check_fits(model, ORIN, model.estimate().run - 1)


@pytest.mark.parametrize("missing", [0.02, 0.1, 0.3])
def test_a_remedy_that_is_called_enough_is_enough(model, missing):
    """A model scaled so that each part counts; the longest sequence that fits is the longest."""
    big = replace(model, weights={name: size * 2000 for name, size in model.weights.items()})
    big = replace(big, bytes_per_value=big.bytes_per_value * 400)
    need = big.estimate().run
    usable = int(need * (1 - missing))
    with pytest.raises(EngineError) as caught:
        check_fits(big, ORIN, usable)
    message = str(caught.value)
    enough = re.findall(r"([^,:(]+) \(([\d.]+) GiB less, enough\)", message)
    assert enough, message
    for _, less in enough:
        assert float(less) >= (need - usable) / GIB - 0.01
    assert "\n" not in message
    if re.search(r"--profiles one \([\d.]+ GiB less, enough\)", message):
        check_fits(replace(big, copies={}), ORIN, usable)
    if found := re.search(r"--max-sequence (\d+) \([\d.]+ GiB less, enough\)", message):
        rows = int(found[1])
        images = min(big.limits.images, max(1, rows // big.manifest.geometry.tokens_per_image))
        check_fits(replace(big, limits=Limits(images, rows)), ORIN, usable)
        with pytest.raises(EngineError):
            check_fits(replace(big, limits=replace(big.limits, sequence=rows + 64)), ORIN, usable)


def test_int4_is_named_with_what_it_saves(model):
    """Segments shrink from 4 bytes per weight to half a byte and a scale for every 128, in each of their two copies."""
    big = replace(model, weights={name: size * 50_000 for name, size in model.weights.items()})
    segments = sum(2 * big.weights[segment.graph] for segment in big.manifest.segments)
    with pytest.raises(EngineError) as caught:
        check_fits(big, ORIN, big.estimate().run // 2)
    (less,) = re.findall(r"int4 weights in the decoder \(([\d.]+) GiB less", str(caught.value))
    assert float(less) == pytest.approx(segments * (1 - (0.5 + 4 / 128) / 4) / GIB, abs=0.01)


def test_more_than_this_machine_has_is_not_built(model):
    need = replace(model.estimate(), build=2**60)
    with pytest.raises(EngineError, match=r"building would take about .* too little: close other programs"):
        check_buildable(need)
