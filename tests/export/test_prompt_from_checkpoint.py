"""The prompt format is read from wherever checkpoints keep its parts."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from edgeprune.errors import CheckpointError
from edgeprune.export.prompt import prompt_format_from_checkpoint, tokenizer_json_from_checkpoint
from edgeprune.runtimes.prompt import PromptEncoder

CONFIG = {"model_type": "llava", "image_token_index": 4, "text_config": {"max_position_embeddings": 512}}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "unk_token": "<unk>",
    "extra_special_tokens": {"image_token": "<image>"},
    "add_bos_token": True,
    "add_eos_token": False,
    "chat_template": "from tokenizer_config",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "what", "?"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token) for token in tokens[:5]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", TOKENIZER_CONFIG)
    return tmp_path


def write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))


def test_everything_in_tokenizer_config(folder):
    ours = prompt_format_from_checkpoint(folder, CONFIG)
    assert ours.chat_template == "from tokenizer_config"
    assert (ours.image_token, ours.image_token_id) == ("<image>", 4)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id) == (1, (2,), None)
    assert ours.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "image_token": "<image>",
    }
    assert ours.context_length == 512


def test_special_tokens_map_fills_gaps(folder):
    write(folder / "tokenizer_config.json", {"eos_token": "</s>", "chat_template": "x"})
    write(folder / "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "pad_token": "<pad>"})
    ours = prompt_format_from_checkpoint(folder, CONFIG)
    assert (ours.bos_token_id, ours.pad_token_id) == (1, 3)


def test_image_token_under_its_other_name(folder):
    config = {**CONFIG, "image_token_id": 4}
    del config["image_token_index"]
    assert prompt_format_from_checkpoint(folder, config).image_token == "<image>"


def test_templates_of_the_processor_come_first(folder):
    def template() -> str:
        return prompt_format_from_checkpoint(folder, CONFIG).chat_template

    assert template() == "from tokenizer_config"
    write(folder / "processor_config.json", {"chat_template": "from processor_config"})
    assert template() == "from processor_config"
    write(folder / "chat_template.json", {"chat_template": "from json"})
    assert template() == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert template() == "from jinja"


def test_named_templates(folder):
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    write(folder / "tokenizer_config.json", {**TOKENIZER_CONFIG, "chat_template": templates})
    assert prompt_format_from_checkpoint(folder, CONFIG).chat_template == "yes"


def test_llava_without_a_template_is_asked_as_vicuna(folder):
    write(folder / "tokenizer_config.json", {**TOKENIZER_CONFIG, "chat_template": None})
    ours = PromptEncoder(prompt_format_from_checkpoint(folder, CONFIG), folder / "tokenizer.json")
    assert ours.render("what ?", 1) == "USER: <image>\nwhat ? ASSISTANT:"
    assert ours.render(" what\n?", 2) == "USER: <image>\n<image>\n what\n? ASSISTANT:"
    assert ours.render("what ?", 0) == "USER: what ? ASSISTANT:"


def test_other_families_need_a_template(folder):
    write(folder / "tokenizer_config.json", {**TOKENIZER_CONFIG, "chat_template": None})
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        prompt_format_from_checkpoint(folder, {**CONFIG, "model_type": "vipllava"})


def test_eos_ids_of_the_generation(folder):
    def eos(**config: object) -> tuple[int, ...]:
        return prompt_format_from_checkpoint(folder, {**CONFIG, **config}).eos_token_ids

    assert eos() == (2,)
    assert eos(text_config={"max_position_embeddings": 8, "eos_token_id": 5}) == (5,)
    assert eos(eos_token_id=6) == (6,)
    write(folder / "generation_config.json", {"eos_token_id": [2, 3]})
    assert eos(eos_token_id=6) == (2, 3)
    write(folder / "generation_config.json", {"eos_token_id": 0})
    assert eos(eos_token_id=6) == (0,)


def test_no_eos_at_all(folder):
    write(folder / "tokenizer_config.json", {"chat_template": "x"})
    with pytest.raises(CheckpointError, match="eos_token_id"):
        prompt_format_from_checkpoint(folder, CONFIG)


def test_context_length_that_configs_leave_out(folder):
    assert prompt_format_from_checkpoint(folder, {**CONFIG, "text_config": {}}).context_length == 2048
    qwen2 = {**CONFIG, "text_config": {"model_type": "qwen2"}}
    assert prompt_format_from_checkpoint(folder, qwen2).context_length == 32768
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        prompt_format_from_checkpoint(folder, {**CONFIG, "text_config": {"model_type": "other"}})
    with pytest.raises(CheckpointError, match="context_length"):
        prompt_format_from_checkpoint(folder, {**CONFIG, "text_config": {"max_position_embeddings": -1}})


def test_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="use_fast=True"):
        prompt_format_from_checkpoint(folder, CONFIG)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[]"])
def test_damaged_files(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        prompt_format_from_checkpoint(folder, CONFIG)


@pytest.mark.parametrize(
    ("settings", "config", "named"),
    [
        ({}, {"image_token_index": None}, "image_token_index"),
        ({}, {"image_token_index": 99}, "no token 99"),
        ({}, {"image_token_index": 5}, "'<image>', but .* 5 is 'what'"),
        ({"pad_token": "[PAD]"}, {}, r"lacks pad_token '\[PAD\]'"),
        ({"add_bos_token": False}, {}, "add_bos_token False .* adds it"),
        ({"add_eos_token": True}, {}, "add_eos_token True .* does not add it"),
        ({"split_special_tokens": True}, {}, "split_special_tokens"),
    ],
)
def test_contradictions(folder, settings, config, named):
    write(folder / "tokenizer_config.json", {**TOKENIZER_CONFIG, **settings})
    with pytest.raises(CheckpointError, match=named):
        prompt_format_from_checkpoint(folder, {**CONFIG, **config})


def test_old_llama_tokenizers_are_written_as_transformers_runs_them(tmp_path):
    """Old files put ▁ before the text after every special token, transformers only before the first."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "\n", *(f"<0x{value:02X}>" for value in range(256))]
    old = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    old.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    old.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>", "<image>")])
    old.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    text = "a b <image>\na ba"
    ours = Tokenizer.from_str(tokenizer_json_from_checkpoint(tmp_path))
    assert ours.encode(text).ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ours.encode(text).ids != old.encode(text).ids


def test_tokenizer_that_transformers_cannot_read(tmp_path):
    with pytest.raises(CheckpointError, match="use_fast=True"):
        tokenizer_json_from_checkpoint(tmp_path)
