"""Trains the example from nothing: ``python examples/shapes/train.py --output DIR``."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from decoder import CAPTION_PROMPT, build_llava, prefix_text, segment_text, train_decoder
from export_hf import round_to_half, save_clip, save_llava
from measure import accuracy_by_kind, accuracy_with_hidden_tokens
from questions import KINDS, ask
from scenes import describe, draw_scene
from tokens import clip_tokenizer, decoder_tokenizer
from tower import train_tower
from transformers import CLIPTokenizer, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

TOWER_STEPS = 2400
DECODER_STEPS = 2400


def language_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """The decoder's tokenizer, trained on questions, answers and captions."""
    rng = random.Random(f"words {seed}")
    corpus = []
    for _ in range(3000):
        scene = draw_scene(rng)
        for kind in KINDS:
            question = ask(scene, rng, kind)
            if question is not None:
                corpus.append(f"{prefix_text()}{segment_text(question.text)} {question.answer}")
        corpus.append(f"{segment_text(CAPTION_PROMPT)} {describe(scene)}")
    return decoder_tokenizer(corpus)


def caption_tokenizer(seed: int) -> CLIPTokenizer:
    """The CLIP text tower's tokenizer, trained on captions."""
    rng = random.Random(f"captions {seed}")
    return clip_tokenizer([describe(draw_scene(rng)) for _ in range(2000)])


def say(line: str) -> None:
    """Print at once, so that a log file can be followed."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def report(folder: Path, questions: int) -> None:
    """Load what was written with transformers alone, and print how good it is."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    for kind, accuracy in accuracy_by_kind(model, processor, questions).items():
        say(f"{kind:14s} {accuracy:.4f}")
    for name, accuracy in accuracy_with_hidden_tokens(model, processor).items():
        say(f"{accuracy:.4f} {name}")


def main() -> None:
    """Train the tower, then the decoder; write ``checkpoint/`` and ``clip/``; report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint/ and clip/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions to ask at the end")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    words, captions = language_tokenizer(arguments.seed), caption_tokenizer(arguments.seed)
    clip = train_tower(captions, seed=arguments.seed, steps=arguments.tower_steps, log=say)
    round_to_half(clip)
    save_clip(clip, captions, arguments.output / "clip")

    torch.manual_seed(arguments.seed)
    model = build_llava(words, clip)

    def save() -> None:
        save_llava(model, words, arguments.output / "checkpoint")

    train_decoder(model, words, seed=arguments.seed, steps=arguments.decoder_steps, on_save=save, log=say)
    round_to_half(model)
    save()
    say(f"trained in {(time.monotonic() - started) / 60:.0f} minutes")
    report(arguments.output / "checkpoint", arguments.questions)


if __name__ == "__main__":
    main()
