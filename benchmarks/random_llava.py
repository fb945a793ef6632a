"""Random LLaVA checkpoints of a given size, for measurements whose speed does not depend on the weights' values."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class LlavaSize:
    """Sizes of a random LLaVA; the defaults make about 0.4 B parameters with 576 visual tokens.

    Attributes:
        hidden_size: Width of the decoder.
        intermediate_size: Width of its MLP.
        num_layers: Its layers.
        num_heads: Its heads.
        vocab_size: Its vocabulary.
        vision_hidden_size: Width of the vision tower (four times that in its MLP).
        vision_layers: Its layers.
        image_size: Side of a picture in pixels.
        patch_size: Side of a patch in pixels.
    """

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 24
    num_heads: int = 16
    vocab_size: int = 32000
    vision_hidden_size: int = 768
    vision_layers: int = 12
    image_size: int = 384
    patch_size: int = 16

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


def write_random_llava(folder: Path, size: LlavaSize, seed: int = 0) -> LlavaForConditionalGeneration:
    """Write a whole checkpoint and return the transformers model, with SDPA attention."""
    torch.manual_seed(seed)
    tokenizer = _byte_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision_hidden_size,
            intermediate_size=4 * size.vision_hidden_size,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_hidden_size // 64,
            image_size=size.image_size,
            patch_size=size.patch_size,
        ),
        text_config=LlamaConfig(
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            vocab_size=size.vocab_size,
            max_position_embeddings=4096,
        ),
        image_token_index=image_token,
        attn_implementation="sdpa",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessor(
            size={"shortest_edge": size.image_size},
            crop_size={"height": size.image_size, "width": size.image_size},
        ),
        tokenizer,
        patch_size=size.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return model


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: text of a known length in tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<pad>", "<image>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
