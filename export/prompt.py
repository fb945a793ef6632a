"""The prompt format of a Hugging Face checkpoint, as data for the bundle."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgeprune.errors import BundleError, CheckpointError
from edgeprune.extras import require
from edgeprune.models.llava_layout import saved_by_llava
from edgeprune.runtimes.prompt import PromptFormat

# The tokens that chat templates may use by name, besides those that a tokenizer names itself.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What Hugging Face's configurations assume where config.json leaves it out, by the decoder's model_type.
_CONTEXT_LENGTHS = {
    "llama": 2048,
    "qwen2": 32768,
    "qwen2_vl_text": 32768,
    "qwen2_5_vl_text": 32768,
    "qwen3": 32768,
}
_IMAGE_TOKEN_IDS = {"qwen2_vl": 151655, "qwen2_5_vl": 151655}

_VICUNA_TEMPLATE = """\
{%- for message in messages -%}
{{- message.role.upper() + ': ' -}}
{%- for part in message.content if part.type == 'image' -%}{{- IMAGE_TOKEN + '\\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


# What LLaVA's own code puts before the first turn (conversation "vicuna_v1").
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def prompt_format_from_checkpoint(
    path: Path, config: dict[str, Any], tokenizer_json: str | None = None
) -> PromptFormat:
    r"""Read the tokenizer's and the template's settings.

    A checkpoint of model_type "llava" without a chat template gets the one of LLaVA-1.5 on Vicuna:
    ``USER: <image>\n… ASSISTANT:``; one that LLaVA's own code has saved, with that code's system prompt before it.

    Args:
        path: The checkpoint's folder.
        config: Its config.json.
        tokenizer_json: The tokenizer; None = the checkpoint's tokenizer.json.

    Raises:
        CheckpointError: A file is missing or damaged, or the files contradict each other.
    """
    tokenizer = _read_tokenizer(path) if tokenizer_json is None else Tokenizer.from_str(tokenizer_json)
    settings = {
        **_read_object(path / "special_tokens_map.json"),
        **_read_object(path / "tokenizer_config.json"),
    }
    special_tokens = _special_tokens(settings)
    _check_added_tokens(path, tokenizer, settings, special_tokens)
    image_token, image_token_id = _image_token(path, config, tokenizer, special_tokens)
    bos_token_id = _token_id(path, tokenizer, special_tokens, "bos_token")
    prefix, suffix = _around_image(path, config, tokenizer, special_tokens)
    try:
        return PromptFormat(
            chat_template=_chat_template(path, config, settings, image_token),
            image_token=image_token,
            image_token_id=image_token_id,
            special_tokens=special_tokens,
            bos_token_id=bos_token_id,
            eos_token_ids=_eos_token_ids(path, config, tokenizer, special_tokens),
            pad_token_id=_token_id(path, tokenizer, special_tokens, "pad_token"),
            context_length=_context_length(path, config),
            image_prefix=prefix,
            image_suffix=suffix,
        )
    except BundleError as error:
        raise CheckpointError(f"{path} does not describe a usable prompt format: {error}") from error


def tokenizer_json_from_checkpoint(path: Path, reader: str = "AutoTokenizer") -> str:
    """The tokenizer.json that belongs into a bundle: what transformers makes of the checkpoint's files.

    transformers rebuilds the tokenizers of some families (Llama among them) from the vocabulary, so that the
    checkpoint's own tokenizer.json, where it is older, may give other ids.

    Args:
        path: The checkpoint's folder.
        reader: transformers' class that reads it.

    Raises:
        CheckpointError: transformers cannot read the tokenizer.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", extra="export", purpose="to read a checkpoint's tokenizer")
    try:
        tokenizer = getattr(transformers, reader).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can read ({reason}): {_RESAVE}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{path} has no tokenizer that the tokenizers library can run: {_RESAVE}")
    return str(tokenizer.backend_tokenizer.to_str())


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    named = {name: settings.get(name) for name in _NAMED_TOKENS}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        named.update(extra)
    # transformers 5 writes the tokens that a model names itself beside the others.
    named.update({name: settings[name] for name in settings if name.endswith("_token") and name not in named})
    texts = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _check_added_tokens(
    path: Path, tokenizer: Tokenizer, settings: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Refuse a tokenizer_config.json that asks for other special tokens than tokenizer.json adds."""
    added = tokenizer.encode("", add_special_tokens=True).ids
    for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        token = special_tokens.get(name)
        adds = token is not None and tokenizer.token_to_id(token) in added
        if isinstance(settings.get(flag), bool) and token is not None and settings[flag] != adds:
            raise CheckpointError(
                f"{path} has {flag} {settings[flag]} in tokenizer_config.json but tokenizer.json "
                f"{'adds' if adds else 'does not add'} it: {_RESAVE}"
            )
    if settings.get("split_special_tokens"):
        raise CheckpointError(f"{path} sets split_special_tokens, which is not supported: set it to false")


def _image_token(
    path: Path, config: dict[str, Any], tokenizer: Tokenizer, special_tokens: dict[str, str]
) -> tuple[str, int]:
    image_token_id = config.get("image_token_index", config.get("image_token_id"))
    if image_token_id is None:
        image_token_id = _IMAGE_TOKEN_IDS.get(str(config.get("model_type")))
    if not isinstance(image_token_id, int):
        raise CheckpointError(
            f"{path / 'config.json'} has no image_token_index: is it a vision-language model?"
        )
    image_token = tokenizer.id_to_token(image_token_id)
    if image_token is None:
        raise CheckpointError(
            f"{path / 'tokenizer.json'} has no token {image_token_id} for pictures: {_RESAVE}"
        )
    if config.get("model_type") == "internvl":
        stated = special_tokens.get("context_image_token")
    else:
        stated = special_tokens.get("image_token") or _read_object(path / "processor_config.json").get(
            "image_token"
        )
    if stated is not None and stated != image_token:
        raise CheckpointError(
            f"{path} names the image token {stated!r}, but config.json's image_token_index {image_token_id} "
            f"is {image_token!r}: correct the one that is wrong"
        )
    return image_token, image_token_id


def _around_image(
    path: Path, config: dict[str, Any], tokenizer: Tokenizer, special_tokens: dict[str, str]
) -> tuple[str, str]:
    """What the processor writes before and behind the visual tokens of a picture."""
    if config.get("model_type") != "internvl":
        return "", ""
    around = []
    for name in ("start_image_token", "end_image_token"):
        if _token_id(path, tokenizer, special_tokens, name) is None:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'} names no {name}, which InternVL's processor needs: add it"
            )
        around.append(special_tokens[name])
    return around[0], around[1]


def _chat_template(path: Path, config: dict[str, Any], settings: dict[str, Any], image_token: str) -> str:
    """The processor's template, else the tokenizer's, else LLaVA-1.5's."""
    if (file := path / "chat_template.jinja").is_file():
        return _read_text(file)
    for name in ("chat_template.json", "processor_config.json"):
        if template := _read_object(path / name).get("chat_template"):
            return str(template)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if isinstance(template, str) and template:
        return template
    if config.get("model_type") != "llava":
        raise CheckpointError(
            f"{path} has no chat template and model_type {config.get('model_type')!r} has no usual one: "
            "write it to chat_template.jinja"
        )
    template = _VICUNA_TEMPLATE.replace("IMAGE_TOKEN", json.dumps(image_token, ensure_ascii=False)).strip()
    return "{{- " + json.dumps(_VICUNA_SYSTEM) + " -}}" + template if saved_by_llava(config) else template


def _eos_token_ids(
    path: Path, config: dict[str, Any], tokenizer: Tokenizer, special_tokens: dict[str, str]
) -> tuple[int, ...]:
    """What generate() stops at: generation_config.json, else config.json, else the tokenizer's own."""
    for source in (_read_object(path / "generation_config.json"), config, config.get("text_config") or {}):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    own = _token_id(path, tokenizer, special_tokens, "eos_token")
    if own is None:
        raise CheckpointError(f"{path} names no eos token: write eos_token_id to generation_config.json")
    return (own,)


def _token_id(path: Path, tokenizer: Tokenizer, special_tokens: dict[str, str], name: str) -> int | None:
    if name not in special_tokens:
        return None
    token_id = tokenizer.token_to_id(special_tokens[name])
    if token_id is None:
        raise CheckpointError(f"{path / 'tokenizer.json'} lacks {name} {special_tokens[name]!r}: {_RESAVE}")
    return token_id


def _context_length(path: Path, config: dict[str, Any]) -> int:
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        # Published Qwen2-VL checkpoints have the decoder's fields beside the others.
        text_config = {**config, "model_type": f"{config.get('model_type')}_text"}
    length = text_config.get("max_position_embeddings")
    if length is None:
        length = _CONTEXT_LENGTHS.get(text_config.get("model_type", "llama"))
    if not isinstance(length, int):
        raise CheckpointError(f"{path / 'config.json'} has no text_config.max_position_embeddings: add it")
    return length


_RESAVE = (
    "save it again with transformers' AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)"
)


def _read_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no tokenizer.json: {_RESAVE}")
    try:
        return Tokenizer.from_str(_read_text(file))
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(
            f"{file} is not a tokenizer ({error}): download the checkpoint again"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: download the checkpoint again")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download the checkpoint again") from error
