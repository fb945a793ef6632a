"""Whole prompts on two backends: answers, kept tokens and logits, for the tests of backends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoints import random_prompt

from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch
from edgeprune.runtimes.guide import GuideEncoder
from edgeprune.runtimes.preprocessing import PictureSource
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session, open_session

PICTURES = check_pictures(3, size=(60, 40))
QUESTION = "What colour is the circle?"
# Of float32 logits.
TOLERANCE = 2e-4
# ATP's count comes from the device, AdaptPrune's and PyramidDrop's (combined) are known, DyRate drops while it answers,
# IVTP has probe rows and a guide, SparseVLM merges tokens.
KINDS = ("atp", "combined", "dyrate", "ivtp", "sparsevlm")
CPU = {"backend": "onnxruntime", "threads": 1}


def answers(
    folder: Path,
    *,
    tokens: int = 12,
    pictures: Sequence[PictureSource] = PICTURES[:2],
    question: str = QUESTION,
    **options: Any,
) -> list[tuple[object, ...]]:
    """About no picture, one, … and all: ids, what the sites kept, and when tokens were dropped later."""
    with open_session(folder, **options) as session:
        found = [
            session.answer(pictures[:count], question, SamplingOptions(tokens))
            for count in range(len(pictures) + 1)
        ]
    return [(answer.token_ids, [(s.kept, s.indices, s.evictions) for s in answer.sites]) for answer in found]


def compare_answers(folder: Path, kind: str, **options: Any) -> None:
    """Ids and kept indices are those of ONNX Runtime on the CPU, exactly."""
    tokens = 30 if kind == "dyrate" else 12
    ours = answers(folder, tokens=tokens, **options)
    assert ours == answers(folder, tokens=tokens, **CPU)
    assert any(indices for _, sites in ours for _, indices, _ in sites), "the comparison would be empty"
    if kind == "dyrate":
        assert any(evictions for _, sites in ours for _, _, evictions in sites), "nothing was dropped later"


def chain_of(folder: Path, **options: Any) -> tuple[Session, GraphChain]:
    """A session's backend with graphs to call one by one."""
    session = open_session(folder, **options)
    manifest = session.bundle.manifest
    graphs = {name: session.backend.load(session.bundle, name) for name in manifest.graphs}
    return session, GraphChain(manifest, session.backend, graphs)


def logits(folder: Path, **options: Any) -> list[np.ndarray]:
    """Of prompts with no picture, one and two, and of three generated tokens each."""
    session, chain = chain_of(folder, **options)
    found: list[np.ndarray] = []
    for images in (0, 1, 2):
        tokens = session.bundle.manifest.geometry.tokens_per_image
        ids, pixels = random_prompt(num_images=images, tokens_per_image=tokens, suffix=9, seed=images)
        tower = None if pixels is None else chain.encode_pictures(pixels, Stopwatch())
        guide = _guide(session, 9) if images else None
        first, sequence = chain.prefill(ids, tower, guide, 4, Stopwatch())
        found += [first, *(chain.decode(20 + step, sequence, Stopwatch()) for step in range(3))]
    return found


def compare_logits(folder: Path, **options: Any) -> None:
    """They differ from ONNX Runtime's on the CPU by the tolerance at most."""
    for ours, theirs in zip(logits(folder, **options), logits(folder, **CPU), strict=True):
        assert theirs.std() > 0.1, "the comparison would be empty"
        assert np.abs(ours - theirs).max() <= TOLERANCE


def _guide(session: Session, num_text: int):
    probe = session.bundle.manifest.probe
    if probe is None or probe.guide_tokenizer is None:
        return None
    encoder = GuideEncoder(session.bundle.file(probe.guide_tokenizer), probe.guide_context_length)
    spans = np.sort(np.random.default_rng(0).integers(0, 20, (num_text, 2)), axis=1)
    return encoder.encode("a red circle on a table", spans.astype(np.int64))
