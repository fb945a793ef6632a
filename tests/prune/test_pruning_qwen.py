"""Pruning in a decoder with M-RoPE, pictures of any size: dropping equals masking in transformers' own decoder."""

import json
import shutil

import numpy as np
import pytest
import torch
from masked_qwen import SIZES, TOLERANCE, MaskedQwen, PromptCase, compare_with_dense, keep_highest
from numpy_references import (
    attention_logits,
    causal_softmax,
    normalised,
    sigmoid,
    spatial_table,
)
from safetensors.torch import load_file
from tiny_checkpoints import add_atp
from tiny_qwen import QWEN2, QWEN25, Reference, build_qwen

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.models.qwen2_vl import Qwen2VlConfig
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.evit import Evit
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.ivtp_vision import IvtpVision
from edgeprune.prune.prumerge import PruMerge
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.sparsevlm import SparseVlm
from edgeprune.prune.tome import Tome
from edgeprune.prune.topk import TopK
from edgeprune.prune.visionzip import VisionZip
from edgeprune.prune.vtw import Vtw


@pytest.fixture(scope="module", params=[QWEN2, QWEN25], ids=lambda spec: spec.model_type)
def dense(request, tmp_path_factory):
    folder = build_qwen(tmp_path_factory.mktemp("checkpoint") / "qwen", request.param)
    return MaskedQwen(Reference(folder, request.param))


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def case(request, dense):
    return PromptCase(dense, request.param)


@pytest.mark.parametrize("layer", [1, 3])
def test_fastv(dense, case, layer):
    """A share of every picture's tokens, in one ranking over all pictures; positions stay where they were."""
    model = load_checkpoint(dense.reference.folder, methods=[FastV(layer=layer, keep_ratio=0.3)])
    count = sum(max(1, int(0.3 * n)) for n in case.pictures.layout.tokens_per_image)
    compare_with_dense(model, dense, case, {layer: keep_highest(layer, case.visual, count)})


def test_fastv_by_number(dense, case):
    """A number per picture, as many as there are if a picture has fewer."""
    model = load_checkpoint(dense.reference.folder, methods=[FastV(layer=2, keep=6)])
    count = 6 * case.pictures.layout.num_images
    compare_with_dense(model, dense, case, {2: keep_highest(2, case.visual, count)})


def test_two_methods(dense, case):
    methods = [FastV(layer=1, keep_ratio=0.6), Vtw(layer=3)]
    model = load_checkpoint(dense.reference.folder, methods=methods)
    count = sum(max(1, int(round(0.6 * n, 6))) for n in case.pictures.layout.tokens_per_image)

    def none(_layers, alive):
        chosen = alive.copy()
        chosen[case.visual] = False
        return chosen

    state = model.prefill(case.ids, case.pictures)
    expected, _, alive = dense.run_at(
        case.embeds, case.positions, {1: keep_highest(1, case.visual, count), 3: none}
    )
    assert (state.logits - expected[-1]).abs().max() <= TOLERANCE
    assert [site.kept for site in state.sites] == [count, 0]
    assert alive[2].sum() == len(case.ids) - len(case.visual) + count


def test_other_positions_would_show(dense, case):
    """The dense run with positions of another kind gives other logits: the comparisons can fail."""
    sites = {2: keep_highest(2, case.visual, 8)}
    right, _, _ = dense.run_at(case.embeds, case.positions, sites)
    flat = torch.arange(case.embeds.shape[1]).expand(3, 1, -1)
    swapped = case.positions[[0, 2, 1]]
    for positions in (flat, swapped):
        wrong, _, _ = dense.run_at(case.embeds, positions, sites)
        assert (wrong[-1] - right[-1]).abs().max() > 100 * TOLERANCE


def test_renumbered_rows_stand_at_one_number_on_all_axes(dense, case):
    """PyramidDrop's published code renumbers the kept rows in prefill: here on time, row and column alike."""
    method = PyramidDrop(layers=(2,), keep_ratios=(0.4,), positions="upstream")
    model = load_checkpoint(dense.reference.folder, methods=[method])
    state = model.prefill(case.ids, case.pictures)
    _, layers, _ = dense.run_at(case.embeds, case.positions, {})
    kept = case.visual[list(state.sites[0].slots)]
    rows = np.sort(np.concatenate((kept, np.setdiff1d(np.arange(len(case.ids)), case.visual))))
    assert len(kept) == sum(max(1, int(0.4 * n)) for n in case.pictures.layout.tokens_per_image)
    hidden = layers[2].hidden[:, torch.from_numpy(rows)]
    renumbered = torch.arange(len(rows)).expand(3, 1, -1)
    expected, _, _ = dense.run_at(hidden, renumbered, {}, first_layer=2)
    assert (state.logits - expected[-1]).abs().max() <= TOLERANCE
    original = case.positions[:, :, torch.from_numpy(rows)]
    other, _, _ = dense.run_at(hidden, original, {}, first_layer=2)
    assert (other[-1] - expected[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "method",
    [
        CdPruner(keep_ratio=0.4),
        Dart(layer=1, keep_ratio=0.4),
        AdaptPrune(layer=2, keep_ratio=0.4),
        PyramidDrop(layers=(3,), keep_ratios=(0.4,)),
    ],
    ids=lambda method: method.name,
)
def test_kept_tokens_stay_at_their_positions(dense, case, method):
    """Whatever a method keeps, the rest of the model computes what it would with the dropped keys masked."""
    model = load_checkpoint(dense.reference.folder, methods=[method])
    slots = model.prefill(case.ids, case.pictures).sites[0].slots
    assert len(slots) == sum(max(1, int(0.4 * n)) for n in case.pictures.layout.tokens_per_image)

    def choose(_layers, alive):
        chosen = alive.copy()
        chosen[np.delete(case.visual, slots)] = False
        return chosen

    compare_with_dense(model, dense, case, {model.plan.sites[0].site.cut.layer: choose})


def test_adaptprune_ranks_every_picture_by_its_own_grid(dense):
    """The picture's middle is favoured in pictures of any shape."""
    case = PromptCase(dense, [(90, 18), (18, 90)])
    model = load_checkpoint(dense.reference.folder, methods=[AdaptPrune(layer=1, keep_ratio=0.25)])
    result = model.prefill(case.ids, case.pictures).sites[0]
    assert result.kept == sum(max(1, n // 4) for n in case.pictures.layout.tokens_per_image)
    assert len(set(result.slots)) == result.kept


# ATP


def atp_kept(method, case, layers, heads, num_text):
    """ATP's definition picture by picture, in cells of the 16 × 16 grid that its heads are made for."""
    before = layers[method.layers[0] - 1]
    query, key = (tensor[0].double().numpy() for tensor in (before.query, before.key))
    logits = attention_logits(query, key)
    cross = causal_softmax(logits)[:, -num_text:].mean(axis=(0, 1))
    kept, first = [], 0
    for grid in case.pictures.layout.grids:
        rows = case.visual[first : first + grid.rows * grid.columns]
        first += len(rows)
        scores = [
            normalised(logits[:, rows].mean(axis=(0, 1)), rows, method.self_norm),
            normalised(cross, rows, method.cross_norm),
        ]
        cells = [[[] for _ in range(256)] for _ in scores]
        for n in range(len(rows)):
            row, column = divmod(n, grid.columns)
            cell = row * 16 // grid.rows * 16 + column * 16 // grid.columns
            for score, by_cell in zip(scores, cells, strict=True):
                by_cell[cell].append(score[n])
        inputs = np.array([np.mean(found) if found else 0.0 for by_cell in cells for found in by_cell])
        z = heads["proj.weight"] @ inputs + heads["proj.bias"]
        theta_r, theta_s = (
            sigmoid(heads[f"{head}.weight"] @ z + heads[f"{head}.bias"])[0] for head in ("head_r", "head_s")
        )
        redundant = (scores[0] + scores[1]) / 2
        spatial = spatial_table((grid.rows, grid.columns), method.strides, method.sample_scale)
        assert min(abs(redundant - theta_r).min(), abs(spatial - theta_s).min()) > 1e-5
        kept.extend(rows[(redundant > theta_r) | (spatial > theta_s)])
    return kept


def test_atp_on_pictures_of_all_sizes(dense, tmp_path):
    folder = shutil.copytree(dense.reference.folder, tmp_path / "atp")
    add_atp(folder, [2], num_patches=256, self_norm="minmax", cross_norm="minmax", theta_r=0.3)
    model = load_checkpoint(folder)
    heads = {
        name.removeprefix("atp.site0."): weight.double().numpy()
        for name, weight in load_file(folder / "pruning.safetensors").items()
    }
    counts = set()
    # The first has 26 columns, more than the heads' grid: tokens share cells.
    for sizes in ([(208, 24), (24, 40)], [(60, 44)], [(16, 120), (33, 33), (90, 40)]):
        case = PromptCase(dense, sizes)
        _, layers, _ = dense.run_at(case.embeds, case.positions, {})
        num_text = len(case.ids) - 1 - int(case.visual[-1])
        kept = atp_kept(model.plan.methods[0], case, layers, heads, num_text)
        result = model.prefill(case.ids, case.pictures).sites[0]
        assert [case.visual[slot] for slot in result.slots] == kept
        assert 0 < result.kept < result.tokens_in
        counts.add(result.kept / result.tokens_in)
    assert len(counts) == 3


# What cannot work


GEOMETRY = Qwen2VlConfig.from_huggingface(
    {"model_type": "qwen2_vl", "text_config": {}, "vision_config": {"hidden_size": 8192}}
).geometry


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            RandomTokens(keep=9),
            (
                "random: this family joins 4 patches to one visual token behind the vision tower, and it drops "
                "single ones; use a decoder method"
            ),
        ),
        (
            SparseVlm(),
            (
                "sparsevlm: its tables count the tokens of pictures of one size, and this family's differ; "
                "use pyramiddrop or fastv"
            ),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_methods_that_cannot_work_are_refused(method, message):
    with pytest.raises(PruningError) as error:
        method.check(GEOMETRY)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "method",
    [Ivtp(), Ivtp(text_selection="all"), IvtpVision(keep=8), Evit(), Tome(), TopK(), PruMerge(), VisionZip()],
    ids=lambda method: method.name,
)
def test_methods_that_need_a_class_token_are_refused(method):
    with pytest.raises(PruningError) as error:
        method.check(GEOMETRY)
    assert str(error.value) == (
        f"{method.name}: this vision tower has no class token or no layers; use a decoder method, such as atp or fastv"
    )


def test_refusal_reaches_whoever_loads_a_checkpoint(tmp_path):
    folder = build_qwen(tmp_path / "qwen")
    methods = [{"method": "ivtp-v", "parameters": {"keep": 8}}]
    (folder / "pruning.json").write_text(json.dumps({"methods": methods}))
    with pytest.raises(PruningError, match="use a decoder method"):
        load_checkpoint(folder)
