"""Measures a checkpoint: accuracy by kind, and how it bears hidden visual tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from decoder import PackedDecoder, Packs
from heldout import HELD_OUT_SEED, held_out_questions
from tower import normalise
from transformers import LlavaForConditionalGeneration, LlavaProcessor

T = TypeVar("T")


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def prompt_of(processor: LlavaProcessor, question: str) -> str:
    """The prompt in the checkpoint's chat format."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


@torch.inference_mode()
def accuracy_by_kind(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    count: int = 2000,
    seed: int = HELD_OUT_SEED,
    size: int = 50,
) -> dict[str, float]:
    """Exact-match accuracy of greedy generation per kind, and over all under ``"all"``."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for batch in _batches(held_out_questions(count, seed), size):
        inputs = processor(
            images=[image for image, _, _ in batch],
            text=[prompt_of(processor, question.text) for _, question, _ in batch],
            return_tensors="pt",
            padding=True,
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        told = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question, _), answer in zip(batch, told, strict=True):
            hits[question.kind].append(answer.strip() == question.answer)
    rates = {kind: float(np.mean(flags)) for kind, flags in hits.items()}
    return {"all": float(np.mean([f for flags in hits.values() for f in flags])), **rates}


@torch.inference_mode()
def accuracy_with_hidden_tokens(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: int = 128
) -> dict[str, float]:
    """Accuracy with visual tokens hidden from a layer on, without any retraining."""
    decoder = PackedDecoder(model, processor.tokenizer)
    layers = len(decoder.language.layers)
    packs = Packs(processor.tokenizer, seed=-1, batches=pictures // 32, size=32)
    generator = torch.Generator().manual_seed(0)
    hits: dict[str, list[float]] = defaultdict(list)
    for index in range(len(packs)):
        pack = packs[index]
        features = model.model.vision_tower(normalise(pack.raw), output_hidden_states=True)
        features = features.hidden_states[-2][:, 1:]
        noise = torch.rand(pack.owners.shape, generator=generator)
        kept = {
            "nothing": torch.ones_like(noise, dtype=torch.bool),
            "random 50 %": noise < 0.5,
            "random 75 %": noise < 0.25,
            "background but 5 %": (pack.owners >= 0) | (noise < 0.05),
        }
        for name, keep in kept.items():
            for start in (1, 4, 8):
                if name == "nothing" and start > 1:
                    continue
                seen = torch.ones(layers, *keep.shape, dtype=torch.bool)
                seen[start:] = keep
                states = decoder(features, [pack.questions], seen)[0]
                answered = pack.question_answers >= 0
                right = torch.ones_like(answered)
                right[answered] = (
                    decoder.logits(states[answered]).argmax(-1) == pack.question_answers[answered]
                )
                hits[f"{name} hidden from layer {start}"].append(right.all(-1).float().mean().item())
    return {name: float(np.mean(values)) for name, values in hits.items()}
