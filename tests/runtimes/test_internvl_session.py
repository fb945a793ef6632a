"""InternVL through bundles: unpruned the answers of transformers, pruned those of the torch reference."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_checkpoints import add_atp, add_dyrate, write_pruning
from tiny_internvl import TinyInternvl, build_internvl, internvl_processor, internvl_prompt
from transformers import InternVLForConditionalGeneration

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PromptError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.export.exporter import export
from edgeprune.inspection import inspect
from edgeprune.prune.fastv import FastV
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.preprocessing import read_picture
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session

SPEC = TinyInternvl(layers=3, vision_layers=2)
QWEN3 = TinyInternvl(text="qwen3", layers=4, vision_layers=2, decoder={"head_dim": 16}, seed=1)
UNPRUNED = {
    "llama": TinyInternvl(
        text="llama", layers=2, vision_layers=2, vision={"norm_type": "rms_norm", "use_qk_norm": True}
    ),
    "qwen3": replace(QWEN3, layers=2, tied=True),
}
# 2 × 2 tiles and overview, 3 × 1 tiles and overview, one tile, a line.
PICTURES = [
    *(
        check_pictures(1, size=size, seed=seed)[0]
        for seed, size in enumerate([(61, 60), (40, 125), (22, 20)])
    ),
    check_pictures(1, size=(400, 8), seed=3)[0],
]
QUESTION = "What colour is the circle?"
# In the tower, by thresholds and by share; by similarity and while generating; IVTP's both stages.
METHODS = {
    "ivtp-v, atp and fastv": {
        "ivtp-v": {"keep": 7},
        "atp": {"layers": [1], "hidden_width": 8},
        "fastv": {"layer": 2, "keep_ratio": 0.2},
    },
    "adaptprune and dyrate": {
        "adaptprune": {"layer": 1, "keep_ratio": 0.8},
        "dyrate": {"layer": 2, "num_rates": 8},
    },
    "ivtp": {
        "ivtp": {
            "tokens_after_vision": 6,
            "tokens_after_decoder": 3,
            "decoder_layers": 2,
            "group_size": 2,
            "text_selection": "all",
        }
    },
    "qwen3: ivtp and fastv": {
        "ivtp": {
            "tokens_after_vision": 6,
            "tokens_after_decoder": 4,
            "decoder_layers": 2,
            "group_size": 2,
            "text_selection": "all",
        },
        "fastv": {"layer": 3, "keep_ratio": 0.2},
    },
    "qwen3: atp and pyramiddrop": {
        "atp": {"layers": [1], "hidden_width": 8},
        "pyramiddrop": {"layers": [2], "keep_ratios": [0.1]},
    },
}
# Opset 20 has no RMSNormalization and no RotaryEmbedding.
OPSETS = {"qwen3: ivtp and fastv": 20}


def spec_of(kind: str) -> TinyInternvl:
    return QWEN3 if kind.startswith("qwen3") else SPEC


def pruned_checkpoint(kind: str, folder: Path) -> Path:
    build_internvl(folder, spec_of(kind))
    if "atp" in METHODS[kind]:
        add_atp(folder, METHODS[kind]["atp"]["layers"], num_patches=9, theta_r=0.002, spread=0.5)
    if "dyrate" in METHODS[kind]:
        add_dyrate(folder, layer=METHODS[kind]["dyrate"]["layer"])
    entries = [{"method": name, "parameters": parameters} for name, parameters in METHODS[kind].items()]
    return write_pruning(folder, entries)


@dataclass(frozen=True)
class Pair:
    """A session and the reference it must agree with."""

    kind: str
    session: Session
    model: PrunedModel
    chain: GraphChain

    def reference(self, pictures, prompt, max_new_tokens):
        """Greedy ids and site results of the reference."""
        prepared = self.prepare(pictures)
        tower = None if prepared is None else self.model.encode_pictures(prepared)
        tokens = () if tower is None else tower.rows.tokens_per_image
        ids = self.session.prompts.encode_chat(prompt, tokens).token_ids
        eos = self.session.prompts.format.eos_token_ids
        return self.model.generate(ids, prepared, max_new_tokens=max_new_tokens, eos_token_ids=eos)

    def prepare(self, pictures):
        return (
            self.session.preprocessing.prepare(list(map(read_picture, pictures)), (3, 3))
            if pictures
            else None
        )


@pytest.fixture(scope="module", params=METHODS)
def pair(request, tmp_path_factory):
    folder = pruned_checkpoint(request.param, tmp_path_factory.mktemp("internvl") / "checkpoint")
    opset = OPSETS.get(request.param, 23)
    bundle = Bundle.open(export(folder, folder.parent / "bundle", opset=opset, images=PICTURES[:2]).path)
    backend = OnnxRuntimeBackend("cpu", 1)
    graphs = {name: backend.load(bundle, name) for name in bundle.manifest.graphs}
    with open_session(bundle.path, threads=1) as session:
        model = load_checkpoint(folder, dtype=torch.float32)
        yield Pair(request.param, session, model, GraphChain(bundle.manifest, backend, graphs))


@pytest.mark.parametrize("shown", [(0,), (2,), (3,), (1, 2), ()], ids=str)
def test_answers_and_kept_tokens_are_those_of_the_reference(pair, shown):
    pictures = [PICTURES[index] for index in shown]
    answer = pair.session.answer(pictures, QUESTION, SamplingOptions(8))
    token_ids, sites = pair.reference(pictures, QUESTION, 8)
    assert list(answer.token_ids) == token_ids
    ours = [(site.name, site.tokens_in, site.kept, site.indices) for site in answer.sites]
    assert ours == [(site.name, site.tokens_in, site.kept, site.slots) for site in sites]
    assert not shown or 0 < answer.sites[-1].kept < answer.visual.slots.size
    dropping = [site.kept < site.tokens_in for site in answer.sites]
    assert all(dropping) or shown != (1, 2), "a site that drops nothing shows nothing"


def test_logits_are_those_of_the_reference(pair):
    counts = set()
    for seed, tiles in enumerate([(1,), (5,), (3, 1), (2, 4, 1), ()]):
        spec = spec_of(pair.kind)
        _, pictures = internvl_prompt(spec, tiles=tiles, seed=seed)
        reference = None if pictures is None else pair.model.encode_pictures(pictures)
        per_tile = pair.session.bundle.manifest.geometry.tokens_per_tile
        ids, _ = internvl_prompt(spec, tiles=tiles, tokens_per_tile=per_tile, seed=seed)
        expected = pair.model.prefill(ids, pictures, tower=reference)
        watch = Stopwatch()
        tower = None if pictures is None else pair.chain.encode_pictures(pictures, watch)
        logits, sequence = pair.chain.prefill(ids, tower, None, 4, watch)
        reports = pair.chain.site_reports(sequence)
        assert [report.indices for report in reports] == [site.slots for site in expected.sites]
        assert expected.logits.std() > 0.1, "the comparison would be empty"
        assert np.abs(logits - expected.logits.numpy()).max() <= 1e-4
        for step in range(3):
            token = 10 + 17 * step
            decoded = pair.model.decode(
                token, expected.next_position + step, expected.caches, eviction=expected.eviction
            )
            assert np.abs(pair.chain.decode(token, sequence, watch) - decoded.numpy()).max() <= 1e-4
        counts.update(report.kept for report in reports)
    assert len(counts) > 3


def test_an_overlay_shows_tiles_and_overview(pair):
    answer = pair.session.answer(PICTURES[:1], QUESTION, SamplingOptions(1))
    whole = pair.session.overlay(PICTURES[0], answer)
    single = pair.session.overlay(
        PICTURES[2], pair.session.answer(PICTURES[2:3], QUESTION, SamplingOptions(1))
    )
    areas = [overlay.size[0] * overlay.size[1] for overlay in (whole, single)]
    assert areas[0] > 1.3 * areas[1], "for every site a panel for the tiles, and one for the overview"


@pytest.fixture(scope="module", params=UNPRUNED)
def unpruned(request, tmp_path_factory):
    folder = build_internvl(tmp_path_factory.mktemp("internvl") / "checkpoint", UNPRUNED[request.param])
    return UNPRUNED[request.param], folder, export(folder, folder.parent / "bundle").path


@pytest.mark.parametrize("shown", [(), (0,), (3,), (2, 1)], ids=str)
def test_unpruned_answers_are_those_of_transformers(unpruned, shown):
    spec, folder, bundle = unpruned
    pictures = [PICTURES[index] for index in shown]
    content = [
        *({"type": "image", "image": picture} for picture in pictures),
        {"type": "text", "text": QUESTION},
    ]
    inputs = internvl_processor(spec).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    with open_session(bundle, threads=1) as session:
        answer = session.answer(pictures, QUESTION, SamplingOptions(8))
        eos = session.prompts.format.eos_token_ids[0]
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(answer.token_ids) == (theirs[: theirs.index(eos)] if eos in theirs else theirs)


def test_float16_bundles_of_qwen3_keep_the_tokens_of_the_reference(tmp_path):
    """Norms of heads in float16; the export compares with float32 arithmetic on the same weights."""
    folder = build_internvl(tmp_path / "checkpoint", replace(QWEN3, layers=2))
    bundle = export(folder, tmp_path / "bundle", methods=[FastV(layer=1, keep_ratio=0.3)], dtype="float16")
    assert all(parity.max_abs_diff <= 2e-2 for parity in bundle.manifest.parity.values())
    assert bundle.manifest.parity["site0"].indices_identical
    norms = [
        tensor
        for graph in ("segment0", "segment1")
        for tensor in onnx.load(
            bundle.file(bundle.manifest.graphs[graph].file), load_external_data=False
        ).graph.initializer
        if tensor.name.endswith(("q_norm.weight", "k_norm.weight"))
    ]
    assert [tensor.data_type for tensor in norms] == [onnx.TensorProto.FLOAT16] * 4
    with open_session(bundle.path, threads=1) as session:
        answer = session.answer(PICTURES[:2], QUESTION, SamplingOptions(4))
    # A share of what each picture has: 5 and 4 tiles of 9 tokens.
    assert (answer.sites[0].tokens_in, answer.sites[0].kept) == (45 + 36, 13 + 10)
    assert len(answer.token_ids) > 0


def test_pictures_that_exceed_the_context_are_refused(unpruned):
    with (
        open_session(unpruned[2], threads=1) as session,
        pytest.raises(PromptError, match="give fewer pictures"),
    ):
        session.answer([PICTURES[0]] * 23, QUESTION)


def test_inspection(pair):
    found = inspect(pair.session.bundle.path)
    vision = found.prefill.groups[0]
    # 13 tiles of 36 patches and a class token, 2 layers of width 24, and the projector: counted by hand.
    rows, width = 37, 24
    tower = 13 * 2 * 2 * (4 * rows * width**2 + 2 * rows**2 * width + 2 * rows * width * 48)
    assert vision.unpruned_flops == tower + 2 * 117 * (96 * 32 + 32 * 32)
    assert (found.geometry.typical_tokens, found.geometry.patches_per_token) == (117, 4)
    per_tile = {"ivtp-v, atp and fastv": 7, "ivtp": 6, "qwen3: ivtp and fastv": 6}.get(pair.kind, 9)
    assert found.geometry.tokens_per_image == 13 * per_tile
    assert (vision.pruned_flops < vision.unpruned_flops) == (per_tile < 9)
