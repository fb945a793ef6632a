"""Bundles of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, positions on three axes, pruned and unpruned."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tiny_checkpoints import add_atp, add_dyrate, write_pruning
from tiny_qwen import (
    IMAGE,
    QWEN2,
    QWEN3,
    VIDEO,
    VISION_END,
    VISION_START,
    Reference,
    TinyQwen,
    build_qwen,
    picture,
)

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PictureError, PromptError
from edgeprune.export.exporter import export
from edgeprune.inspection import inspect
from edgeprune.models.qwen_vl import TYPICAL_GRID
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session
from edgeprune.verification import verify

QUESTION = "What colour is the circle?"
NUM_CELLS = TYPICAL_GRID[0] * TYPICAL_GRID[1]
# Width and height of every picture of a prompt.
PROMPTS = [[(60, 44)], [(9, 7)], [(90, 24), (33, 70)], [(17, 17), (200, 13), (40, 40)], []]


def unpruned(folder):
    return folder


def atp(folder):
    """ATP's heads are made for one grid; pictures of other sizes are averaged into its cells."""
    return add_atp(folder, [2], num_patches=NUM_CELLS, self_norm="minmax")


def by_share(folder):
    """A share of each picture, twice, then a rate that grows while the answer is generated."""
    add_dyrate(folder, layer=3, heads=QWEN2.heads)
    return write_pruning(
        folder,
        [
            {"method": "adaptprune", "parameters": {"layer": 1, "keep_ratio": 0.7}},
            {"method": "fastv", "parameters": {"layer": 2, "keep_ratio": 0.5}},
            {"method": "dyrate", "parameters": {"layer": 3, "num_rates": 8}},
        ],
    )


@dataclass(frozen=True)
class Pair:
    """A session, the torch reference that it must agree with, and transformers."""

    session: Session
    model: PrunedModel
    reference: Reference

    def prepared(self, images):
        read = [read_picture(image) for image in images]
        return self.session.preprocessing.prepare(read, TYPICAL_GRID) if images else None

    def ids(self, images, prompt):
        counts = self.prepared(images).layout.tokens_per_image if images else ()
        return self.session.prompts.encode_chat(prompt, counts).token_ids


SPECS = {
    "qwen2_vl unpruned": (TinyQwen(layers=2, vision_layers=2, tied=True, seed=7), unpruned, 23),
    "qwen2_vl atp": (TinyQwen(vision_layers=2, seed=8), atp, 20),
    "qwen2_5_vl by share": (TinyQwen("qwen2_5_vl", vision_layers=2, seed=9), by_share, 23),
    # DeepStack adds behind layers 0 and 1: a site before the last addition, one right behind it, one later.
    "qwen3_vl by share": (replace(QWEN3, vision_layers=2, deepstack_layers=(0, 1)), by_share, 23),
    # It adds behind layers 0, 1 and 2: the site lies before the last addition.
    "qwen3_vl atp": (replace(QWEN3, layers=3, deepstack_layers=(0, 1, 2), seed=17), atp, 20),
}


@pytest.fixture(scope="module", params=SPECS.values(), ids=SPECS.keys())
def pair(request, tmp_path_factory):
    spec, prune, opset = request.param
    root = tmp_path_factory.mktemp("qwen")
    folder = prune(build_qwen(root / "checkpoint", spec))
    bundle = export(folder, root / "bundle", opset=opset)
    with open_session(bundle.path, threads=1) as session:
        yield Pair(session, load_checkpoint(folder), Reference(folder, spec))


def images_of(sizes):
    return [picture(*size, seed + 20) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("sizes", PROMPTS, ids=str)
def test_prompt_is_that_of_the_processor(pair, sizes):
    images = images_of(sizes)
    theirs = pair.reference.chat(images, QUESTION)
    assert pair.ids(images, QUESTION).tolist() == theirs["input_ids"][0].tolist()
    if images:
        ours = pair.prepared(images)
        np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"].numpy(), rtol=0, atol=1e-6)
        merge = pair.reference.spec.merge_size
        grids = [[1, merge * grid.rows, merge * grid.columns] for grid in ours.layout.grids]
        assert grids == theirs["image_grid_thw"].tolist()


def test_placeholders_in_the_question(pair):
    """Written with the marks that the model knows round a picture."""
    images = images_of([(40, 24), (24, 50)])
    mark = VISION_START + IMAGE + VISION_END
    question = f"{mark} is left of {mark}: what is in the picture?"
    text = pair.reference.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True
    )
    theirs = pair.reference.inputs(images, text)["input_ids"][0]
    assert pair.ids(images, question).tolist() == theirs.tolist()


@pytest.mark.parametrize("sizes", PROMPTS, ids=str)
def test_answer_is_that_of_the_reference(pair, sizes):
    images = images_of(sizes)
    answer = pair.session.answer(images, QUESTION, SamplingOptions(max_new_tokens=8))
    pictures, ids = pair.prepared(images), pair.ids(images, QUESTION)
    eos = pair.session.bundle.manifest.prompt["eos_token_ids"]
    token_ids, sites = pair.model.generate(ids, pictures, max_new_tokens=8, eos_token_ids=eos)
    assert list(answer.token_ids) == token_ids
    ours = [(site.name, site.tokens_in, site.kept, site.indices) for site in answer.sites]
    assert ours == [(site.name, site.tokens_in, site.kept, site.slots) for site in sites]
    assert len(ours) == (len(pair.session.bundle.manifest.sites) if images else 0)
    if not pair.session.bundle.manifest.sites:
        theirs = greedy(pair.reference, pair.reference.chat(images, QUESTION), 8, eos)
        assert list(answer.token_ids) == theirs


def greedy(reference, inputs, max_new_tokens, eos):
    tokens = []
    while len(tokens) < max_new_tokens:
        token = int(reference.steps(inputs, tokens)[-1].argmax())
        if token in eos:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("sizes", PROMPTS, ids=str)
def test_logits_are_those_of_the_reference(pair, sizes):
    images = images_of(sizes)
    ids, pictures = pair.ids(images, QUESTION), pair.prepared(images)
    bundle, backend = pair.session.bundle, pair.session.backend
    graphs = {name: backend.load(bundle, name) for name in bundle.manifest.graphs}
    chain, watch = GraphChain(bundle.manifest, backend, graphs), Stopwatch()
    tower = chain.encode_pictures(pictures, watch) if images else None
    logits, sequence = chain.prefill(ids, tower, None, 6, watch)
    expected = pair.model.prefill(ids, pictures)
    tokens = [11, 200, 47]
    theirs = pair.reference.steps(pair.reference.chat(images, QUESTION), tokens)
    assert sequence.position == expected.next_position
    for step in range(len(tokens) + 1):
        assert np.abs(logits - expected.logits.numpy()).max() <= 1e-4
        if not bundle.manifest.sites or not images:
            assert np.abs(logits - theirs[step].numpy()).max() <= 1e-4
        if step == len(tokens):
            break
        logits = chain.decode(tokens[step], sequence, watch)
        expected.logits = pair.model.decode(
            tokens[step], expected.next_position + step, expected.caches, eviction=expected.eviction
        )
    assert theirs[0].std() > 0.1, "the comparison would be empty"


def test_pruned_counts(pair):
    """By share they follow the picture's size; by thresholds what it shows."""
    manifest = pair.session.bundle.manifest
    if not manifest.sites:
        assert pair.session.answer(images_of([(60, 44)]), QUESTION).sites == ()
        return
    seen = set()
    for seed, size in enumerate([(60, 44), (60, 44), (24, 90), (80, 16), (33, 33)]):
        image = picture(*size, seed + 40)
        tokens = sum(pair.prepared([image]).layout.tokens_per_image)
        answer = pair.session.answer([image], QUESTION, SamplingOptions(max_new_tokens=1))
        counts = [site.kept for site in answer.sites]
        assert answer.sites[0].tokens_in == tokens
        assert counts == sorted(counts, reverse=True)
        seen.add((tokens, *counts))
        if manifest.pruning[0].method == "adaptprune":
            shares = [max(1, int(round(tokens * share, 6))) for share in (0.7, 0.5)]
            assert counts[:2] == [shares[0], min(shares)]
    assert len(seen) >= 4
    assert all(0 < counts[-1] < counts[0] for counts in seen)


def test_overlay(pair):
    image = picture(90, 30)
    answer = pair.session.answer([image], QUESTION, SamplingOptions(max_new_tokens=1))
    drawn = pair.session.overlay(image, answer)
    assert drawn.width > 90


def test_inspect(pair):
    inspected = inspect(pair.session.bundle.path)
    manifest = pair.session.bundle.manifest
    assert (inspected.geometry.typical_tokens, inspected.geometry.tokens_per_image) == (256, 256)
    assert inspected.geometry.positions == "multimodal"
    vision = inspected.prefill.groups[0]
    spec = pair.reference.spec
    width, patches = spec.vision_hidden, 4 * 256
    inner, matrices = {"qwen2_vl": (48, 2), "qwen2_5_vl": (36, 3), "qwen3_vl": (36, 2)}[spec.model_type]
    # Layer 1 of the tower attends to the whole picture, layer 0 of Qwen2.5-VL to windows of 4 × 4 patches.
    spans = [16 if spec.model_type == "qwen2_5_vl" else patches] + [patches] * (spec.vision_layers - 1)
    tower = sum(
        2 * (patches * (4 * width**2 + 2 * span * width) + matrices * patches * width * inner)
        for span in spans
    )
    projector = 2 * 256 * (4 * width * 4 * width + 4 * width * spec.hidden_size)
    if spec.model_type == "qwen3_vl":
        projector *= 1 + len(spec.deepstack_layers)
    assert vision.unpruned_flops == tower + projector
    if manifest.pruning and manifest.pruning[0].method == "adaptprune":
        assert [group.visual_tokens for group in inspected.prefill.groups[1:]] == [256, 179, 128, 128]


def test_verify(pair):
    report = verify(pair.session.bundle.path, checkpoint=pair.reference.folder)
    assert report.parity.keys() == pair.session.bundle.manifest.graphs.keys()
    assert all(parity.max_abs_diff <= 1e-4 for parity in report.parity.values())


def test_pictures_and_prompts_that_do_not_fit(pair, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    with pytest.raises(PictureError, match="longer than 200 times"):
        pair.session.answer([picture(402, 2)], QUESTION)
    with pytest.raises(PromptError, match=r"1 placeholders '<\|image_pad\|>' for 2 pictures"):
        pair.session.answer([picture(9, 9)] * 2, f"{IMAGE} what is it?")
    with pytest.raises(
        PromptError, match=r"has '<\|video_pad\|>', the placeholder of a video: ask about pictures"
    ):
        pair.session.answer([picture(9, 9)], f"{VIDEO} what is it?")
    with pytest.raises(PictureError, match="is not a picture that Pillow can read"):
        pair.session.answer([clip], QUESTION)
    with pytest.raises(PromptError, match="exceed the context of 1024"):
        pair.session.answer([picture(80, 64)] * 14, QUESTION)


def test_manifest_holds_the_preprocessing_as_data(pair):
    data = json.loads((pair.session.bundle.path / "manifest.json").read_text())
    preprocessing = data["preprocessing"]
    assert preprocessing["kind"] == "patches"
    assert preprocessing["window_tokens"] == (2 if pair.reference.spec.model_type == "qwen2_5_vl" else 0)
    assert (preprocessing["min_pixels"], preprocessing["max_pixels"]) == (4 * 64, 80 * 64)
