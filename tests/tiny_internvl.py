"""Tiny random InternVL checkpoints, whole as Hugging Face saves them, with the real processor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_checkpoints import CORPUS, _randomise, _silent
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.visual_layout import VisualGrid, VisualLayout

START, END, CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<video>"
IMAGE_TOKEN_ID = 3  # the fourth special token of internvl_tokenizer, as of llava_tokenizer
# The template that transformers' conversion script writes, its branches for videos left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TinyInternvl:
    """A tiny InternVL checkpoint; the defaults are InternVL3's kinds of modules, 6×6 patches to 3×3 tokens a tile."""

    text: str = "qwen2"
    layers: int = 4
    hidden_size: int = 32
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 48
    vocab_size: int = 320
    context_length: int = 1024
    image_size: int = 24
    patch_size: int = 4
    vision_layers: int = 4
    vision_hidden: int = 24
    vision_heads: int = 2
    max_patches: int = 4
    min_patches: int = 1
    tied: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4})
    decoder: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=lambda: {"attention_bias": True})
    model: dict[str, Any] = field(default_factory=dict)
    std: float = 0.2
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile."""
        patches = self.image_size // self.patch_size
        return round(patches * self.model.get("downsample_ratio", 0.5)) ** 2


class Processor(InternVLProcessor):
    """transformers' processor, without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


def internvl_tokenizer(vocab_size: int = 320, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with InternVL's special tokens, Qwen's way (without BOS) or InternLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", CONTEXT, START, END, VIDEO]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(["<s>"] if bos else [])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": CONTEXT,
            "video_token": VIDEO,
        },
    )


def internvl_processor(spec: TinyInternvl) -> Processor:
    """transformers' processor of a spec."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": spec.image_size, "width": spec.image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
        min_patches=spec.min_patches,
        max_patches=spec.max_patches,
    )
    tokenizer = internvl_tokenizer(spec.vocab_size, bos=spec.text == "llama")
    return Processor(
        image_processor, tokenizer, None, image_seq_length=spec.tokens_per_tile, chat_template=CHAT_TEMPLATE
    )


def build_internvl(folder: Path, spec: TinyInternvl = TinyInternvl()) -> Path:
    """Write a whole InternVL checkpoint with random weights and return its folder."""
    processor = internvl_processor(spec)
    tokenizer = processor.tokenizer
    text_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[spec.text]
    config = InternVLConfig(
        text_config=text_class(
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            intermediate_size=spec.intermediate_size,
            vocab_size=spec.vocab_size,
            max_position_embeddings=spec.context_length,
            rope_parameters=dict(spec.rope),
            tie_word_embeddings=spec.tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **spec.decoder,
        ),
        vision_config=InternVLVisionConfig(
            **{
                "hidden_size": spec.vision_hidden,
                "num_hidden_layers": spec.vision_layers,
                "num_attention_heads": spec.vision_heads,
                "intermediate_size": 2 * spec.vision_hidden,
                "image_size": spec.image_size,
                "patch_size": spec.patch_size,
                "layer_scale_init_value": 1.0,
                **spec.vision,
            }
        ),
        image_token_id=processor.image_token_id,
        image_seq_length=spec.tokens_per_tile,
        tie_word_embeddings=spec.tied,
        **spec.model,
    )
    with _silent():
        model = InternVLForConditionalGeneration(config)
        _randomise(model, spec.std, spec.seed)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(spec.dtype).save_pretrained(folder)
        # The files of a published checkpoint; the processor as a whole is not saved without that of videos.
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def internvl_prompt(
    spec: TinyInternvl = TinyInternvl(),
    *,
    tiles: Sequence[int] = (3,),
    tokens_per_tile: int | None = None,
    suffix: int = 7,
    seed: int = 0,
) -> tuple[np.ndarray, PreparedPictures | None]:
    """Token ids [S] with pictures of some tiles each among random text, and the pictures (None without)."""
    rng = np.random.default_rng(seed)
    count = spec.tokens_per_tile if tokens_per_tile is None else tokens_per_tile
    side, box = round(spec.tokens_per_tile**0.5), (0.0, 0.0, 1.0, 1.0)

    def text(length: int) -> list[int]:
        # The first ids are special tokens.
        return rng.integers(10, spec.vocab_size, length).tolist()

    ids, grids = text(5), list[VisualGrid]()
    for image, number in enumerate(tiles):
        ids += [4, *[IMAGE_TOKEN_ID] * (number * count), 5, *text(2)]
        grids += [VisualGrid(image, side, side, box)] * number
    ids += text(suffix)
    pixels = rng.standard_normal((sum(tiles), 3, spec.image_size, spec.image_size)).astype(np.float32)
    layout = VisualLayout.of_whole_grids(grids)
    return np.array(ids, dtype=np.int64), PreparedPictures(
        {"pixel_values": pixels}, layout
    ) if tiles else None
