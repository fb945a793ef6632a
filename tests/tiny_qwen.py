"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints, as Hugging Face saves them, and transformers' own runs."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CORPUS, _randomise, _silent
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL = (END, START, STOP, VISION_START, VISION_END, IMAGE, VIDEO)
# Of the form of the published ones: counters in a namespace, a flag that nobody sets, contents that are a text.
CHAT_TEMPLATE = (
    "{% set seen = namespace(pictures=0) %}"
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set seen.pictures = seen.pictures + 1 %}"
    "{% if add_vision_id %}Picture {{ seen.pictures }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of the form of Qwen3-VL's: no system turn of its own, tools, turns of tools, attributes instead of items.
QWEN3_CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set images = namespace(value=0) %}
{%- set videos = namespace(value=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                    {%- set images.value = images.value + 1 %}
                    {%- if add_vision_id %}Picture {{ images.value }}: {% endif -%}
                    <|vision_start|><|image_pad|><|vision_end|>
                {%- elif part.type == 'video' or 'video' in part %}
                    {%- set videos.value = videos.value + 1 %}
                    {%- if add_vision_id %}Video {{ videos.value }}: {% endif -%}
                    <|vision_start|><|video_pad|><|vision_end|>
                {%- elif 'text' in part %}
                    {{- part.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if (loop.first and message.content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- call.name + (call.arguments if call.arguments is string else (call.arguments | tojson)) }}
        {%- endfor %}
    {%- elif message.role == "tool" and (loop.first or (messages[loop.index0 - 1].role != "tool")) %}
        {{- '<|im_start|>user' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class TinyQwen:
    """A tiny checkpoint; the defaults are a Qwen2-VL with tokens of 8 × 8 pixels and at most 80 of them."""

    model_type: str = "qwen2_vl"
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 12
    mrope_section: tuple[int, ...] = (2, 2, 2)
    vision_layers: int = 3
    vision_hidden: int = 24
    vision_heads: int = 2
    patch_size: int = 4
    merge_size: int = 2
    window_size: int = 16
    global_layers: tuple[int, ...] = (1,)
    position_side: int = 5
    deepstack_layers: tuple[int, ...] = (0, 2)
    tied: bool = False
    max_tokens: int = 80
    std: float = 0.2
    seed: int = 0

    @property
    def hidden_size(self) -> int:
        """C."""
        return self.heads * self.head_dim

    @property
    def factor(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_size * self.merge_size


QWEN2, QWEN25 = TinyQwen(), TinyQwen("qwen2_5_vl", seed=1)
# Frequencies that take turns, and a remainder that turns with time.
QWEN3 = TinyQwen("qwen3_vl", mrope_section=(3, 2, 1), seed=11)
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}


def build_qwen(folder: Path, spec: TinyQwen = QWEN2) -> Path:
    """Write a whole checkpoint with random weights and return its folder."""
    tokenizer = qwen_tokenizer()
    text = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": 40,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": list(spec.mrope_section),
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(STOP),
        "pad_token_id": tokenizer.convert_tokens_to_ids(END),
    }
    vision: dict[str, Any] = {
        "depth": spec.vision_layers,
        "num_heads": spec.vision_heads,
        "patch_size": spec.patch_size,
        "spatial_merge_size": spec.merge_size,
    }
    if spec.model_type == "qwen3_vl":
        text["head_dim"] = spec.head_dim
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {
            "hidden_size": spec.vision_hidden,
            "out_hidden_size": spec.hidden_size,
            "intermediate_size": 36,
            "num_position_embeddings": spec.position_side**2,
            "deepstack_visual_indexes": list(spec.deepstack_layers),
        }
    elif spec.model_type == "qwen2_vl":
        vision |= {"embed_dim": spec.vision_hidden, "hidden_size": spec.hidden_size, "mlp_ratio": 2}
    else:
        vision |= {
            "hidden_size": spec.vision_hidden,
            "out_hidden_size": spec.hidden_size,
            "intermediate_size": 36,
            "window_size": spec.window_size,
            "fullatt_block_indexes": list(spec.global_layers),
        }
    config_class, model_class, _ = CLASSES[spec.model_type]
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(VISION_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(VISION_END),
        tie_word_embeddings=spec.tied,
    )
    with _silent():
        model = model_class(config)
        _randomise(model, spec.std, spec.seed)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(STOP)
        model.save_pretrained(folder)
        qwen_processor(spec, tokenizer).save_pretrained(folder)
    return folder


def qwen_processor(spec: TinyQwen, tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """The family's processor without its video processor, which needs torchvision."""

    class PictureProcessor(CLASSES[spec.model_type][2]):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    third = spec.model_type == "qwen3_vl"
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if third else {}
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * spec.factor**2, "longest_edge": spec.max_tokens * spec.factor**2},
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        **half,
    )
    template = QWEN3_CHAT_TEMPLATE if third else CHAT_TEMPLATE
    return PictureProcessor(images, tokenizer, chat_template=template)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE without a first token, trained on a few sentences."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=list(SPECIAL),
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Reference:
    """transformers' model and processor of a checkpoint."""

    def __init__(self, folder: Path, spec: TinyQwen) -> None:
        self.spec, self.folder = spec, folder
        self.model = CLASSES[spec.model_type][1].from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = qwen_processor(spec, Qwen2Tokenizer.from_pretrained(folder))

    @staticmethod
    def config_class(model_type: str) -> type:
        """transformers' configuration."""
        return CLASSES[model_type][0]

    @cached_property
    def image_token_id(self) -> int:
        """Id of the placeholder."""
        return self.model.config.image_token_id

    def chat(self, images: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        """The processor's inputs for a question about pictures."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return self.inputs(images, text)

    def inputs(self, images: list[Image.Image], text: str) -> dict[str, torch.Tensor]:
        """The processor's inputs for a text with placeholders."""
        return dict(self.processor(text=[text], images=images or None, return_tensors="pt"))

    @torch.no_grad()
    def steps(self, inputs: dict[str, torch.Tensor], tokens: list[int]) -> list[torch.Tensor]:
        """Logits [V] of the prompt's last row and behind each of ``tokens``, with transformers' cache and positions."""
        self.model.model.rope_deltas = None
        out = self.model(**inputs, use_cache=True)
        logits = [out.logits[0, -1]]
        for token in tokens:
            ids, cache = torch.tensor([[token]]), out.past_key_values
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1])
        return logits


def flatten_config(folder: Path) -> None:
    """Write config.json as published checkpoints have it: the decoder's fields beside the others."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "bos_token_id"):
        text.pop(name, None)
    flat = {
        **config,
        **text,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
    }
    vision = flat["vision_config"]
    vision.pop("rope_parameters", None)
    vision.pop("model_type", None)
    vision["in_chans"] = vision.pop("in_channels")
    vision["spatial_patch_size"] = vision["patch_size"]
    path.write_text(json.dumps(flat))


def nest_weights(folder: Path) -> None:
    """Give the weights the names that they have inside transformers since 4.52, and that some checkpoints have."""
    weights = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(weights).items():
        if name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        elif name.startswith("visual."):
            name = "model." + name
        renamed[name] = tensor
    save_file(renamed, weights, metadata={"format": "pt"})
