"""Pruning before, among and behind DeepStack's additions: dropping equals masking in transformers' own decoder."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from masked_qwen import SIZES, TOLERANCE, MaskedQwen, PromptCase, compare_with_dense, keep_highest
from tiny_qwen import QWEN3, Reference, build_qwen

from edgeprune import tensor_names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.export.trace import trace_stage
from edgeprune.models.llama import Cut
from edgeprune.models.qwen3_vl import Qwen3VlConfig
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.fastv import FastV, FastVSelector
from edgeprune.prune.method import DecoderSite, PruningMethod
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.sparsevlm import SparseVlm
from edgeprune.prune.tome import Tome
from edgeprune.prune.visionzip import VisionZip
from edgeprune.prune.vtw import Vtw
from edgeprune.pruning_plan import PruningPlan


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """DeepStack adds behind layers 0 and 1 of 4."""
    folder = build_qwen(tmp_path_factory.mktemp("checkpoint") / "qwen", QWEN3)
    return MaskedQwen(Reference(folder, QWEN3))


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def case(request, dense):
    return PromptCase(dense, request.param)


@dataclass(frozen=True)
class BeforeMlp(PruningMethod):
    """FastV one block earlier: between a layer's attention and its MLP, by that attention."""

    layer: int
    keep_ratio: float

    name: ClassVar[str] = "before-mlp"

    def check(self, geometry):
        pass

    def decoder_sites(self, geometry):
        del geometry
        return (
            DecoderSite(
                cut=Cut(self.layer, before_mlp=True),
                reads=(tensor_names.query(self.layer), tensor_names.present_key(self.layer)),
                host_inputs=(tensor_names.TEXT_ROWS, tensor_names.NUM_KEEP),
                keep_per_image=None,
                keep_share=self.keep_ratio,
            ),
        )

    def selector(self, site, geometry, weights, decoder):
        del site, geometry, weights, decoder
        return FastVSelector(self.layer + 1)


def share_of(case, share):
    return sum(max(1, int(round(share * n, 6))) for n in case.pictures.layout.tokens_per_image)


def test_the_unpruned_dense_run_is_transformers_own(dense, case):
    """The masked decoder adds the features where transformers does."""
    expected, _, _ = case.run(dense, {})
    assert (expected[-1] - dense.reference.steps(case.inputs, [])[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layer", [1, 2, 3], ids=["among", "right behind", "behind"])
def test_fastv(dense, case, layer):
    model = load_checkpoint(dense.reference.folder, methods=[FastV(layer=layer, keep_ratio=0.3)])
    compare_with_dense(model, dense, case, {layer: keep_highest(layer, case.visual, share_of(case, 0.3))})
    carried = [spec.name for spec, _ in model.gather.carried]
    assert (tensor_names.DEEPSTACK_FEATURES in carried) == (layer == 1)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_site_before_an_mlp(dense, case, layer):
    """The layer's addition comes behind its MLP, in the next segment."""
    model = load_checkpoint(dense.reference.folder, methods=[BeforeMlp(layer, 0.4)])
    compare_with_dense(
        model, dense, case, {layer + 1: keep_highest(layer + 1, case.visual, share_of(case, 0.4))}
    )
    takes = [tensor_names.DEEPSTACK_FEATURES in {spec.name for spec in s.inputs} for s in model.segments]
    assert takes == [layer > 0, layer < 2]


def test_an_addition_behind_the_last_layer(tmp_path):
    """The last segment is an MLP, an addition and the head, without attention."""
    spec = replace(QWEN3, layers=2, deepstack_layers=(0, 1), seed=19)
    dense = MaskedQwen(Reference(build_qwen(tmp_path / "qwen", spec), spec))
    case = PromptCase(dense, [(60, 44)])
    model = load_checkpoint(dense.reference.folder, methods=[BeforeMlp(1, 0.4)])
    state = model.prefill(case.ids, case.pictures)
    # Nothing is attended to behind the site.
    expected, _, _ = case.run(dense, {})
    assert (state.logits - expected[-1]).abs().max() <= TOLERANCE
    assert [spec.name for spec in model.segments[1].inputs] == ["hidden_states", "deepstack_features"]
    graph = trace_stage(model.segments[1], torch.float32, 23)
    assert [value.name for value in graph.graph.inputs] == ["hidden_states", "deepstack_features"]


@pytest.mark.parametrize(
    "method",
    [
        CdPruner(keep_ratio=0.4),
        Dart(layer=1, keep_ratio=0.4),
        AdaptPrune(layer=1, keep_ratio=0.4),
        AdaptPrune(layer=1, keep_ratio=0.4, key_source="normed"),
        PyramidDrop(layers=(1,), keep_ratios=(0.4,)),
    ],
    ids=lambda method: f"{method.name} {getattr(method, 'key_source', '')}".strip(),
)
def test_kept_tokens_keep_their_features(dense, case, method):
    """Whatever a method keeps, the rest of the model computes what it would with the dropped keys masked."""
    model = load_checkpoint(dense.reference.folder, methods=[method])
    slots = model.prefill(case.ids, case.pictures).sites[0].slots
    assert len(slots) == share_of(case, 0.4)

    def choose(_layers, alive):
        chosen = alive.copy()
        chosen[np.delete(case.visual, slots)] = False
        return chosen

    compare_with_dense(model, dense, case, {model.plan.sites[0].site.cut.layer: choose})


def test_two_sites_among_the_additions(dense, case):
    """The first before every addition, on the embedded prompt; the second drops all that is left."""
    methods = [CdPruner(keep_ratio=0.6), Vtw(layer=1)]
    model = load_checkpoint(dense.reference.folder, methods=methods)
    state = model.prefill(case.ids, case.pictures)
    kept = case.visual[list(state.sites[0].slots)]

    def some(_layers, alive):
        chosen = alive.copy()
        chosen[np.setdiff1d(case.visual, kept)] = False
        return chosen

    def none(_layers, alive):
        chosen = alive.copy()
        chosen[case.visual] = False
        return chosen

    expected, _, _ = case.run(dense, {0: some, 1: none})
    assert (state.logits - expected[-1]).abs().max() <= TOLERANCE


def test_features_of_other_rows_would_show(dense, case):
    """The dense run with the features one row further, or only behind the first layer, gives other logits."""
    sites = {1: keep_highest(1, case.visual, 8)}
    right, _, _ = case.run(dense, sites)
    moved = [features.roll(1, dims=1) for features in case.additions]
    for additions in (moved, case.additions[:1], case.additions[::-1]):
        wrong, _, _ = dense.run_at(case.embeds, case.positions, sites, additions=additions)
        assert (wrong[-1] - right[-1]).abs().max() > 100 * TOLERANCE


# What cannot work


GEOMETRY = Qwen3VlConfig.from_huggingface(
    {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"out_hidden_size": 4096}}
).geometry


@dataclass(frozen=True)
class Merging(BeforeMlp):
    """Says that its site merges dropped tokens."""

    def decoder_sites(self, geometry):
        (site,) = super().decoder_sites(geometry)
        return (
            DecoderSite(site.cut, site.reads, site.host_inputs, 8, recycled_per_image=6, merged_per_image=2),
        )


def test_tokens_are_not_merged_before_the_last_addition():
    assert GEOMETRY.deepstack_layers == 3
    with pytest.raises(PruningError) as error:
        PruningPlan((Merging(2, 0.5),), GEOMETRY)
    assert str(error.value) == (
        "before-mlp merges tokens before the MLP of layer 2, and DeepStack adds features of single tokens behind the "
        "first 3 layers: merge before layer 3 or a later one"
    )
    assert PruningPlan((Merging(3, 0.5),), GEOMETRY).carried_deepstack_layers == 0


@pytest.mark.parametrize(
    "method", [Tome(), VisionZip(), RandomTokens(keep=9), SparseVlm()], ids=lambda method: method.name
)
def test_methods_in_and_behind_the_tower_are_refused(method):
    with pytest.raises(PruningError) as error:
        PruningPlan((method,), GEOMETRY)
    assert "use" in str(error.value)
    assert "\n" not in str(error.value)
