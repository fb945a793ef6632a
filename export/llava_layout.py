"""What a bundle needs of a checkpoint that LLaVA's own code has saved: preprocessing, tokenizer and prompt format."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edgeprune.checkpoint_weights import read_json
from edgeprune.errors import CheckpointError
from edgeprune.export.crop_settings import clip_preprocessing, image_preprocessing_from_checkpoint
from edgeprune.export.prompt import tokenizer_json_from_checkpoint
from edgeprune.models.llava_layout import IMAGE_TOKEN, PAD, RESIZE, tower_folder
from edgeprune.runtimes.pictures import PicturePreprocessing
from edgeprune.runtimes.square_padding import SquarePadding


def preprocessing_of(folder: Path, config: Mapping[str, Any], clip: Path | None) -> PicturePreprocessing:
    """The image processor of the checkpoint, else of its vision tower, after LLaVA's ``image_aspect_ratio``.

    Args:
        folder: The checkpoint.
        config: Its config in transformers' form.
        clip: The CLIP checkpoint of the vision tower, if the user has given one.

    Raises:
        CheckpointError: The settings are damaged or not supported.
    """
    tower = tower_folder(config, folder, clip)
    named = ("preprocessor_config.json", "processor_config.json")
    source = next(
        (
            path
            for path in (folder, tower)
            if path is not None and any((path / name).is_file() for name in named)
        ),
        None,
    )
    side = int(config["vision_config"].get("image_size", 336))
    crop = clip_preprocessing(side) if source is None else image_preprocessing_from_checkpoint(source)
    if crop.input_size != (side, side):
        raise CheckpointError(
            f"{source} gives pictures of {crop.input_size[0]} × {crop.input_size[1]}, the vision tower takes "
            f"{side} × {side}: give the CLIP checkpoint that config.json names with --clip PATH"
        )
    aspect = config.get("image_aspect_ratio")
    if aspect == PAD:
        red, green, blue = (int(255 * value) for value in crop.mean)
        return SquarePadding(crop, (red, green, blue))
    if aspect == RESIZE:
        # VILA stretches with Pillow's default filter; what CLIP's processor does then changes nothing.
        return replace(
            crop, shortest_edge=None, resize_to=crop.input_size, center_crop=None, resample="bicubic"
        )
    return crop


def tokenizer_json_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer with a token for pictures, tokenizing the text around pictures as LLaVA's code does.

    That code tokenizes each piece of text between pictures by itself, so that each begins with SentencePiece's ▁.

    Raises:
        CheckpointError: There is no tokenizer, or it does not fit the embeddings.
    """
    slow = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if slow and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder} has its tokenizer as tokenizer.model alone, which takes sentencepiece to read: "
            "pip install sentencepiece protobuf"
        )
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    # By model_type, transformers would take a class of its own for "llava", which reads tokenizer.model differently.
    llama = named in (None, "LlamaTokenizer", "LlamaTokenizerFast")
    data = json.loads(tokenizer_json_from_checkpoint(folder, "LlamaTokenizer" if llama else "AutoTokenizer"))
    if (data.get("pre_tokenizer") or {}).get("type") == "Metaspace" and not data.get("normalizer"):
        data["pre_tokenizer"] = None
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        data["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced],
        }
    tokenizer = Tokenizer.from_str(json.dumps(data))
    expected = config["image_token_index"]
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        # Embeddings may have more rows than there are tokens.
        fillers = [AddedToken(f"<no token {index}>", special=True) for index in range(size, expected)]
        tokenizer.add_special_tokens([*fillers, AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    found = tokenizer.token_to_id(IMAGE_TOKEN)
    if found != expected:
        raise CheckpointError(
            f"{folder} has a tokenizer of {found} tokens for embeddings of {expected} (vocab_size): "
            "give the tokenizer that belongs to the checkpoint"
        )
    return str(tokenizer.to_str())
