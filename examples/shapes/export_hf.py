"""Writes the trained models as plain Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from scenes import IMAGE_SIZE, PATCH_SIZE
from tower import MEAN, STD
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% else %}"
    "{{ 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def image_processor() -> CLIPImageProcessor:
    """CLIP's own steps at the example's picture size."""
    return CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        do_center_crop=True,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )


def llava_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that expands ``<image>`` to one placeholder per patch."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def round_to_half(model: PreTrainedModel) -> None:
    """Round the weights to what the float16 files can hold; they stay float32 in memory."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())


def _save(model: PreTrainedModel, folder: Path) -> None:
    halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=halves)


def save_llava(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> LlavaProcessor:
    """Write model, processor, tokenizer, chat template and generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=48,
    )
    _save(model, folder)
    # Readers older than transformers 5 look for rope_theta by itself.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = llava_processor(tokenizer)
    processor.save_pretrained(folder)
    return processor


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the CLIP model whose vision tower LLaVA uses."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(model, folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
