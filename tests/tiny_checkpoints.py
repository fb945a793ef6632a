"""Tiny random checkpoints, whole as Hugging Face saves them: weights, config, tokenizer, processor, template.

Weights are drawn wide enough that attention is far from uniform: a wrong mask, position or score shows.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPConfig,
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
from transformers.utils import logging

from edgeprune.runtimes.pictures import PreparedPictures

try:
    from transformers import CLIPImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor as ImageProcessor

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
IMAGE_TOKEN_ID = 3  # the fourth special token of llava_tokenizer
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_CONTEXT_LENGTH = 77
CORPUS = (
    "USER: What colour is the circle? ASSISTANT: The circle is red.",
    "USER: How many squares are in the picture? ASSISTANT: There are two squares in the picture.",
    "a photo of a small red circle left of a large blue square",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyLlava:
    """A tiny LLaVA checkpoint; the defaults are grouped-query, untied, on a 6×6 grid."""

    layers: int = 4
    hidden_size: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    intermediate_size: int = 48
    vocab_size: int = 320
    image_size: int = 24
    patch_size: int = 4
    vision_layers: int = 4
    vision_hidden: int = 24
    vision_heads: int = 2
    vision_act: str = "quick_gelu"
    feature_layer: int = -2
    projector_bias: bool = True
    tied: bool = False
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    std: float = 0.2
    seed: int = 0
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"

    @property
    def num_patches(self) -> int:
        """Visual tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


TINY = TinyLlava()


def build_llava(folder: Path, spec: TinyLlava = TINY) -> Path:
    """Write a whole LLaVA checkpoint with random weights and return its folder."""
    tokenizer = llava_tokenizer(spec.vocab_size)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": spec.rope_factor}
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            vocab_size=spec.vocab_size,
            max_position_embeddings=512,
            rope_parameters=rope,
            attention_bias=spec.attention_bias,
            mlp_bias=spec.mlp_bias,
            tie_word_embeddings=spec.tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=_vision_config(spec),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=spec.feature_layer,
        vision_feature_select_strategy="default",
        multimodal_projector_bias=spec.projector_bias,
        tie_word_embeddings=spec.tied,
    )
    image_processor = ImageProcessor(
        size={"shortest_edge": spec.image_size},
        crop_size={"height": spec.image_size, "width": spec.image_size},
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    with _silent():
        model = LlavaForConditionalGeneration(config)
        _randomise(model, spec.std, spec.seed)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.to(spec.dtype).save_pretrained(folder, max_shard_size=spec.max_shard_size)
        processor.save_pretrained(folder)
    return folder


def build_clip(folder: Path, llava: Path, spec: TinyLlava = TINY, *, text_layers: int = 2) -> Path:
    """Write a CLIP checkpoint whose vision tower is that of the LLaVA checkpoint in ``llava``."""
    tokenizer = clip_tokenizer()
    vision = _vision_config(spec)
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            hidden_size=16,
            num_hidden_layers=text_layers,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=len(tokenizer),
            max_position_embeddings=CLIP_CONTEXT_LENGTH,
            projection_dim=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=12,
    )
    with _silent():
        model = CLIPModel(config)
        _randomise(model, spec.std, spec.seed + 1)
        donor = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
        model.vision_model.load_state_dict(donor.model.vision_tower.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def add_atp(
    folder: Path,
    layers: Sequence[int],
    *,
    num_patches: int = TINY.num_patches,
    hidden_width: int = 8,
    theta_r: float = 0.15,
    theta_s: float = 0.6,
    spread: float = 1.5,
    seed: int = 0,
    **parameters: Any,
) -> Path:
    """Add ``pruning.json`` and ``pruning.safetensors`` with random heads of ATP before ``layers``.

    The thresholds scatter round ``theta_r`` and ``theta_s`` with the picture, the more the larger ``spread``.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in range(len(layers)):
        prefix = f"atp.site{site}"
        features = 2 * num_patches
        tensors[f"{prefix}.proj.weight"] = (
            torch.randn(hidden_width, features, generator=generator) / features**0.5
        )
        tensors[f"{prefix}.proj.bias"] = torch.zeros(hidden_width)
        for head, theta in (("head_r", theta_r), ("head_s", theta_s)):
            weight = torch.randn(1, hidden_width, generator=generator)
            tensors[f"{prefix}.{head}.weight"] = weight * (spread * 3 / hidden_width**0.5)
            tensors[f"{prefix}.{head}.bias"] = torch.logit(torch.tensor([theta]))
    save_file(tensors, folder / "pruning.safetensors")
    values = {"layers": list(layers), "hidden_width": hidden_width, **parameters}
    return write_pruning(folder, [{"method": "atp", "parameters": values}])


def add_dyrate(folder: Path, layer: int, *, num_rates: int = 8, heads: int = TINY.heads) -> Path:
    """Add ``pruning.json`` and ``pruning.safetensors`` of DyRate.

    The logit of rate k is -(k - 1 - 3R·s)² + c, linear in the share s that heads pay to the response: the rate begins
    at 1/R and grows with s.
    """
    rates = torch.arange(num_rates, dtype=torch.float32)
    weight = torch.zeros(num_rates, heads, 4)
    weight[:, :, 3] = (2 * rates * 3 * num_rates / heads)[:, None]
    # The terms in s alone are the same for all rates.
    bias = -(rates**2) + 2 * rates
    tensors = {"dyrate.predictor.weight": weight.flatten(1), "dyrate.predictor.bias": bias}
    save_file(tensors, folder / "pruning.safetensors")
    return write_pruning(
        folder, [{"method": "dyrate", "parameters": {"layer": layer, "num_rates": num_rates}}]
    )


def write_pruning(folder: Path, methods: Sequence[dict[str, Any]]) -> Path:
    """Write ``pruning.json``."""
    (folder / "pruning.json").write_text(json.dumps({"methods": list(methods)}), encoding="utf-8")
    return folder


def edit_json(path: Path, **fields: Any) -> None:
    """Overwrite fields of a JSON object in a file; a field set to ``...`` is removed."""
    data = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(
        json.dumps({key: value for key, value in data.items() if value is not ...}), encoding="utf-8"
    )


def edit_weights(path: Path, **tensors: Any) -> None:
    """Overwrite tensors of a safetensors file, ``__`` for a dot; a tensor set to ``...`` is removed."""
    data = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in data.items() if tensor is not ...}, path)


def random_prompt(
    spec: TinyLlava = TINY,
    *,
    num_images: int = 1,
    tokens_per_image: int | Sequence[int] | None = None,
    prefix: int = 5,
    between: int = 3,
    suffix: int = 7,
    seed: int = 0,
) -> tuple[np.ndarray, PreparedPictures | None]:
    """Token ids [S] with pictures among random text, and the pictures (None without)."""
    rng = np.random.default_rng(seed)
    tokens = spec.num_patches if tokens_per_image is None else tokens_per_image
    counts = [tokens] * num_images if isinstance(tokens, int) else list(tokens)

    def text(length: int) -> list[int]:
        # The first ids are special tokens.
        return rng.integers(10, spec.vocab_size, length).tolist()

    ids = [0, *text(prefix - 1)]
    for image in range(num_images):
        ids += (text(between) if image else []) + [IMAGE_TOKEN_ID] * counts[image]
    ids += text(suffix)
    pixels = rng.standard_normal((num_images, 3, spec.image_size, spec.image_size)).astype(np.float32)
    rows = spec.image_size // spec.patch_size
    pictures = PreparedPictures.of_whole_tiles(pixels, (rows, rows)) if num_images else None
    return np.array(ids, dtype=np.int64), pictures


def llava_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds the BOS token and encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        extra_special_tokens={"image_token": AddedToken(IMAGE, special=True, normalized=False)},
    )


def clip_tokenizer(vocab_size: int = 560) -> CLIPTokenizer:
    """CLIP's lower-cased BPE with ``</w>`` at word ends; the end token has the highest id."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    ordered = [*alphabet, *(letter + "</w>" for letter in alphabet), *trained["vocab"], CLIP_BOS, CLIP_EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(ordered))}
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_CONTEXT_LENGTH)


def _vision_config(spec: TinyLlava) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=spec.vision_hidden,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=spec.vision_heads,
        intermediate_size=2 * spec.vision_hidden,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hidden_act=spec.vision_act,
        projection_dim=12,
    )


@torch.no_grad()
def _randomise(model: torch.nn.Module, std: float, seed: int) -> None:
    """Draw every weight anew; norm weights stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.1 * noise if is_norm else std * noise)


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and no advice from transformers."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
