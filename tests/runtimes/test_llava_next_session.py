"""LLaVA-NeXT through bundles: transformers' answers unpruned, the torch reference's when pruned."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import add_atp, add_dyrate, write_pruning
from tiny_llava_next import (
    Reference,
    TinyLlavaNext,
    build_clip_of,
    build_llava_next,
    pictures,
    with_base,
)

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.export.exporter import export
from edgeprune.export.preprocessing import picture_preprocessing_from_checkpoint
from edgeprune.inspection import inspect
from edgeprune.prune.registry import METHODS
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.guide import GuideEncoder
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session

SPEC = with_base(TinyLlavaNext(), layers=3, vision_layers=3, seed=20)
PATCHES = SPEC.base.num_patches
QUESTION = "What colour is the circle?"
# Nothing, a wide picture, a tall and a tiny one, one of newlines alone and a square one.
PICTURES = ([], [(60, 40)], [(37, 61), (7, 5)], [(2, 90), (48, 48)])


def atp_and_dyrate(folder: Path) -> None:
    add_dyrate(folder, layer=2)
    dyrate = load_file(folder / "pruning.safetensors")
    methods = json.loads((folder / "pruning.json").read_text())["methods"]
    add_atp(folder, [1], num_patches=PATCHES)
    methods = json.loads((folder / "pruning.json").read_text())["methods"] + methods
    save_file(load_file(folder / "pruning.safetensors") | dyrate, folder / "pruning.safetensors")
    write_pruning(folder, methods)


def ivtp(folder: Path) -> None:
    parameters = {
        "tokens_after_vision": 20,
        "tokens_after_decoder": 10,
        "decoder_layers": 2,
        "group_size": 2,
        "relevance_threshold": 0.0,
    }
    write_pruning(folder, [{"method": "ivtp", "parameters": parameters}])


def random_adaptprune_and_fastv(folder: Path) -> None:
    random = {"method": "random", "parameters": {"keep": 12, "seed": 1}}
    adaptprune = {"method": "adaptprune", "parameters": {"layer": 1, "keep_ratio": 0.3}}
    fastv = {"method": "fastv", "parameters": {"layer": 2, "keep_ratio": 0.1}}
    write_pruning(folder, [random, adaptprune, fastv])


PRUNINGS: dict[str, Callable[[Path], object]] = {
    "unpruned": lambda folder: folder,
    "atp and dyrate": atp_and_dyrate,
    "ivtp": ivtp,
    "random, adaptprune and fastv": random_adaptprune_and_fastv,
}


@dataclass(frozen=True)
class Opened:
    """A bundle's session and the reference of its checkpoint."""

    kind: str
    folder: Path
    session: Session
    model: PrunedModel
    chain: GraphChain
    guide: GuideEncoder | None


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    return build_llava_next(tmp_path_factory.mktemp("checkpoint") / "next", SPEC)


@pytest.fixture(scope="module")
def opened(request, plain_folder, tmp_path_factory) -> Iterator[Opened]:
    folder = Path(shutil.copytree(plain_folder, tmp_path_factory.mktemp("checkpoint") / "pruned"))
    PRUNINGS[request.param](folder)
    clip = None
    if request.param == "ivtp":
        clip = build_clip_of(tmp_path_factory.mktemp("checkpoint"), folder, SPEC)
    bundle = export(folder, tmp_path_factory.mktemp("bundle") / "next", clip=clip)
    probe = bundle.manifest.probe
    guide = None
    if probe is not None and probe.guide_tokenizer is not None:
        guide = GuideEncoder(bundle.file(probe.guide_tokenizer), probe.guide_context_length)
    with open_session(bundle.path, threads=1) as session:
        backend = session.backend
        graphs = {name: backend.load(bundle, name) for name in bundle.manifest.graphs}
        chain = GraphChain(bundle.manifest, backend, graphs)
        yield Opened(request.param, folder, session, load_checkpoint(folder, clip=clip), chain, guide)


@pytest.mark.parametrize("opened", PRUNINGS, indirect=True)
def test_sessions_give_the_answers_of_the_reference(opened):
    """Greedy ids, kept slots and logits; unpruned, transformers itself is the reference."""
    transformers = Reference(opened.folder) if opened.kind == "unpruned" else None
    for seed, sizes in enumerate(PICTURES):
        images = pictures(sizes, seed=seed)
        prepared = opened.session.preprocessing.prepare(images, (6, 6)) if images else None
        tower = None if prepared is None else opened.model.encode_pictures(prepared)
        counts = () if tower is None else tower.rows.tokens_per_image
        encoded = opened.session.prompts.encode_chat(QUESTION, counts)
        guide = None
        if opened.guide is not None and images:
            guide = opened.guide.encode(encoded.tail_text, encoded.tail_offsets)

        answer = opened.session.answer(images, QUESTION, SamplingOptions(max_new_tokens=8))
        ids, sites = opened.model.generate(
            encoded.token_ids, prepared, guide, max_new_tokens=8, eos_token_ids=(1,)
        )
        assert list(answer.token_ids) == ids
        ours = [(site.name, site.tokens_in, site.kept, site.indices) for site in answer.sites]
        assert ours == [(site.name, site.tokens_in, site.kept, site.slots) for site in sites]
        if transformers is not None:
            expected = transformers.greedy(images, QUESTION, 8)
            assert ids == (expected[: expected.index(1)] if 1 in expected else expected)
        else:
            assert len(sites) == (len(opened.model.plan.sites) if images else 0)
            check_sites(opened, answer, prepared)

        watch = Stopwatch()
        encoded_tower = None if prepared is None else opened.chain.encode_pictures(prepared, watch)
        logits, sequence = opened.chain.prefill(encoded.token_ids, encoded_tower, guide, 4, watch)
        state = opened.model.prefill(encoded.token_ids, prepared, guide)
        assert state.logits.std() > 0.1
        assert np.abs(logits - state.logits.numpy()).max() <= 1e-4
        for step in range(2):
            token = 20 + 13 * step
            expected_logits = opened.model.decode(
                token, state.next_position + step, state.caches, eviction=state.eviction
            )
            ours_logits = opened.chain.decode(token, sequence, watch)
            assert np.abs(ours_logits - expected_logits.numpy()).max() <= 1e-4


def check_sites(opened: Opened, answer, prepared) -> None:
    """What must hold of the kept slots, whoever computed them."""
    if prepared is None:
        return
    layout = prepared.layout
    entering = set(answer.entering)
    newlines = set(range(layout.places.shape[0] - layout.inserted, layout.places.shape[0]))
    assert entering <= set(layout.slots.tolist())
    assert newlines <= entering, "what a tower drops is never a newline"
    before = entering
    for site in answer.sites:
        assert site.tokens_in == len(before)
        assert 0 < site.kept < site.tokens_in
        assert set(site.indices) < before
        before = set(site.indices)
    if opened.kind.startswith("random"):
        kept = [sum(max(1, int(count * share)) for count in layout.tokens_per_image) for share in (0.3, 0.1)]
        assert [site.kept for site in answer.sites] == kept
        drawing = opened.session.overlay(pictures([(60, 40)])[0], answer)
        assert drawing.width > 360


@pytest.mark.parametrize("opened", ["random, adaptprune and fastv"], indirect=True)
def test_inspection_counts_a_typical_picture(opened):
    """48 × 36 pixels: five tiles; 36 tokens, and 9 rows of 12 tokens and a newline, 10 after rounding to even."""
    report = inspect(opened.session.bundle.path)
    geometry = report.geometry
    assert (geometry.typical_tiles, geometry.typical_tokens) == (5, 36 + 10 * 13)
    assert geometry.tokens_per_image == 5 * 12 + 10
    prefill = report.prefill
    vision = prefill.groups[0]
    assert vision.unpruned_flops > vision.pruned_flops > 0
    assert [group.visual_tokens for group in prefill.groups[1:]] == [70, 49, 16]


def test_methods_that_count_pictures_of_one_size_are_refused(plain_folder):
    with pytest.raises(PruningError, match="use pyramiddrop or fastv") as error:
        load_checkpoint(plain_folder, methods=[METHODS["sparsevlm"](layers=(0,), keep=(9,))])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("pyramiddrop", {"layers": (1, 2), "keep_ratios": (0.5, 0.2)}),
        ("vtw", {"layer": 2}),
        ("ivtp-v", {"keep": 14, "group_size": 1}),
        ("evit", {"layers": (0, 1), "keep_ratio": 0.6}),
        ("tome", {"r": 4}),
        ("cdpruner", {"keep_ratio": 0.3}),
        ("dart", {"layer": 1, "keep_ratio": 0.5}),
        ("prumerge", {"neighbours": 8}),
        ("prumerge-plus", {}),
        ("visionzip", {"dominant": 10, "contextual": 4}),
        ("topk", {"keep": 12}),
        ("spatial-pooling", {"rows": 3, "columns": 3}),
    ],
)
def test_other_methods_run(plain_folder, method, parameters):
    """In the reference; their graphs are those of LLaVA."""
    model = load_checkpoint(plain_folder, methods=[METHODS[method](**parameters)])
    theirs = Reference(plain_folder)
    images = pictures([(60, 40), (7, 5), (2, 90)])
    preprocessing = picture_preprocessing_from_checkpoint(plain_folder, "llava_next")
    prepared = preprocessing.prepare(images, (6, 6))
    tower = model.encode_pictures(prepared)
    inputs = theirs.inputs(images, QUESTION)
    ids = inputs["input_ids"][0].numpy()
    text = ids[ids != 3]
    ids = np.concatenate((text[:1], np.full(sum(tower.rows.tokens_per_image), 3), text[1:]))
    pruned = model.prefill(ids, prepared, tower=tower)
    assert torch.isfinite(pruned.logits).all()
    newlines = -np.sort(tower.rows.rows[tower.rows.rows < 0])[::-1] - 1
    assert newlines.size == prepared.layout.inserted
    if model.plan.tokens_per_tile is None:
        assert tower.rows.tokens_per_image == prepared.layout.tokens_per_image
    else:
        assert sum(tower.rows.tokens_per_image) < sum(prepared.layout.tokens_per_image)
