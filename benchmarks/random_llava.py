"""Random LLaVA checkpoints of a given size, for measurements whose speed does not depend on the weights' values."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from edgeprune.prune.atp import Atp
from edgeprune.prune.method import ModelGeometry

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


# 0.4 B parameters in few layers: tracing takes time by layer, building by parameter.
FEW_LAYERS = LlavaSize(
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=6,
    vocab_size=1024,
    vision_hidden_size=1024,
    vision_layers=6,
    image_size=224,
)


def write_random_llava(folder: Path, size: LlavaSize, seed: int = 0) -> LlavaForConditionalGeneration:
    """Write a whole checkpoint and return the transformers model, with SDPA attention."""
    torch.manual_seed(seed)
    tokenizer = _byte_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=_vision_config(size),
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


def write_random_clip(folder: Path, size: LlavaSize, llava: LlavaForConditionalGeneration) -> None:
    """Write a CLIP checkpoint with the tower of a LLaVA and a small text tower, for IVTP's guide."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(ordered)}, merges=[], model_max_length=77
    )
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            hidden_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            intermediate_size=2048,
            vocab_size=len(ordered),
            max_position_embeddings=77,
            projection_dim=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        vision_config=_vision_config(size).to_dict(),
        projection_dim=512,
    )
    model = CLIPModel(config).eval()
    model.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_random_thresholds(folder: Path, method: Atp, geometry: ModelGeometry) -> None:
    """Write random heads for ATP, with which about half of the tokens survive each site."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{method.name}.{name}": torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
        for name, shape in method.weight_shapes(geometry).items()
    }
    save_file(weights, folder / "pruning.safetensors")


def _vision_config(size: LlavaSize) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=4 * size.vision_hidden_size,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_hidden_size // 64,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )


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
