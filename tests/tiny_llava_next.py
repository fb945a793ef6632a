"""Tiny random LLaVA-NeXT checkpoints, as transformers saves them, and transformers' own answers to prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CHAT_TEMPLATE,
    IMAGE,
    TINY,
    TinyLlava,
    _randomise,
    _silent,
    _vision_config,
    build_clip,
    build_llava,
    llava_tokenizer,
)
from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class TinyLlavaNext:
    """A tiny LLaVA-NeXT checkpoint.

    Attributes:
        base: Sizes of tower, projector and decoder.
        decoder: ``model_type`` of the decoder.
        resolutions: Resolutions in tiles, (down, across).
    """

    base: TinyLlava = TINY
    decoder: str = "llama"
    resolutions: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

    @property
    def pinpoints(self) -> list[list[int]]:
        """The same in pixels."""
        side = self.base.image_size
        return [[down * side, across * side] for down, across in self.resolutions]


TINY_NEXT = TinyLlavaNext()


def build_llava_next(folder: Path, spec: TinyLlavaNext = TINY_NEXT) -> Path:
    """Write a whole LLaVA-NeXT checkpoint with random weights and return its folder."""
    base = spec.base
    tokenizer = llava_tokenizer(base.vocab_size)
    text: dict[str, Any] = {"head_dim": base.head_dim} if spec.decoder != "qwen2" else {}
    if spec.decoder == "mistral":
        text["sliding_window"] = None
    config = LlavaNextConfig(
        text_config=TEXT_CONFIGS[spec.decoder](
            hidden_size=base.hidden_size,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            num_key_value_heads=base.kv_heads,
            intermediate_size=base.intermediate_size,
            vocab_size=base.vocab_size,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": base.rope_theta},
            tie_word_embeddings=base.tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **text,
        ),
        vision_config=_vision_config(base),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=base.feature_layer,
        multimodal_projector_bias=base.projector_bias,
        tie_word_embeddings=base.tied,
        image_grid_pinpoints=spec.pinpoints,
    )
    with _silent():
        model = LlavaNextForConditionalGeneration(config)
        _randomise(model, base.std, base.seed)
        # Newlines as large as the visual tokens beside them.
        model.model.image_newline.data *= 5
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(base.dtype).save_pretrained(folder)
        processor_of(spec, tokenizer).save_pretrained(folder)
    return folder


def build_clip_of(folder: Path, checkpoint: Path, spec: TinyLlavaNext) -> Path:
    """Write a CLIP checkpoint with the vision tower of a LLaVA-NeXT checkpoint into a new folder inside ``folder``."""
    clip = build_clip(folder / "clip", build_llava(folder / "llava", spec.base), spec.base)
    tower = {
        "vision_model." + name.rpartition("vision_tower.")[2].removeprefix("vision_model."): tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
        if "vision_tower." in name
    }
    weights = load_file(clip / "model.safetensors")
    assert set(tower) <= set(weights)
    save_file(weights | tower, clip / "model.safetensors")
    return clip


def processor_of(
    spec: TinyLlavaNext, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> LlavaNextProcessor:
    """transformers' processor on Pillow."""
    side = spec.base.image_size
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=spec.pinpoints,
        **options,
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=spec.base.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Coloured noise of (width, height) each, coarse enough that tiles differ."""
    rng = np.random.default_rng(seed)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        for size in sizes
    ]


class Reference:
    """transformers on one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        processor = LlavaNextProcessor.from_pretrained(folder)
        # The saved class is that of torchvision, which resamples slightly differently.
        processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(folder)
        self.processor = processor

    def inputs(self, images: Sequence[Image.Image], question: str) -> dict[str, torch.Tensor]:
        """Token ids, pixels and sizes of a question about pictures."""
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return dict(self.processor(images=list(images) or None, text=text, return_tensors="pt"))

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor], more: Sequence[int] = ()) -> torch.Tensor:
        """[V], of the last row, with ``more`` tokens behind the prompt."""
        ids = torch.cat((inputs["input_ids"], torch.tensor([more], dtype=torch.int64)), dim=1)
        pictured = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        return self.model(input_ids=ids, use_cache=False, **pictured).logits[0, -1]

    def greedy(self, images: Sequence[Image.Image], question: str, num_tokens: int) -> list[int]:
        """The first tokens of the greedy answer."""
        inputs, tokens = self.inputs(images, question), list[int]()
        for _ in range(num_tokens):
            tokens.append(int(self.logits(inputs, tokens).argmax()))
        return tokens


def with_base(spec: TinyLlavaNext = TINY_NEXT, **fields: Any) -> TinyLlavaNext:
    """A spec with other sizes."""
    return replace(spec, base=replace(spec.base, **fields))
