"""Prompts are rendered, tokenized and decoded as by transformers' LlavaProcessor."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from edgeprune.errors import BundleError, PromptError
from edgeprune.export.prompt import prompt_format_from_checkpoint
from edgeprune.runtimes.prompt import IncrementalDecoder, PromptEncoder, PromptFormat

CORPUS = [
    "USER: what is in the picture? ASSISTANT: a red square, left of two blue circles.",
    "How many cats are on the table, and which of them sleeps?  There are   three.",
    "Wie viele Bücher liegen auf dem Tisch? Où est le café? 图片里有什么？ 🙂🙃",
] * 3
BYTES = [f"<0x{value:02X}>" for value in range(256)]
TOKENS_PER_IMAGE = 4  # a picture of 28 × 28 in patches of 14, without the class token

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HEADER_TEMPLATE = """\
{{ bos_token }}{% set names = ['user'] %}
{% for message in messages %}
    {% if message.role not in names %}
        {{ raise_exception('unknown role') }}
    {% endif %}
<|start|>{{ message.role }} {{ {'<': 'ä'} | tojson }}
{% for part in message.content %}
    {% if part.type == 'image' %}<image>
    {% else %}{{ part.text | trim }}
    {% break %}
    {% endif %}
{% endfor %}
{% endfor %}
{{ strftime_now('%Y') | length }}{% if tools is none %}<|start|>assistant {% endif %}"""


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2 and Llama-3 style."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|start|>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
    )


def llama_tokenizer() -> LlamaTokenizer:
    """SentencePiece style, with ▁ and byte fallback."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *BYTES]
    # 图 and 🙂 are in the corpus, but are left to the bytes.
    latin = [text.encode("latin-1", "ignore").decode("latin-1") for text in CORPUS]
    trained.train_from_iterator(
        latin, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True
    )
    tokenizer.add_special_tokens(
        {"pad_token": "<pad>", "extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=True
    )
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """SentencePiece's other model, with the decoder of old conversions."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("  ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


class Pair:
    """transformers' processor as saved to a folder and loaded again, and ours for the same folder."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        ).save_pretrained(folder)
        config = {
            "model_type": "llava",
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "text_config": {"max_position_embeddings": 2048},
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.theirs = AutoProcessor.from_pretrained(folder)
        self.file = folder / "tokenizer.json"
        self.ours = PromptEncoder(prompt_format_from_checkpoint(folder, config), self.file)

    def their_ids(self, text: str, num_images: int) -> list[int]:
        images = [Image.new("RGB", (30, 40))] * num_images or None
        return self.theirs(text=text, images=images)["input_ids"][0]

    def their_chat(self, prompt: str, num_images: int, tokenize: bool = False) -> str | list[int]:
        content = [{"type": "image", "image": Image.new("RGB", (30, 40))}] * num_images
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        chat = self.theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=tokenize)
        return chat[0] if tokenize else chat


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {
        "llama": Pair(tmp_path_factory.mktemp("llama"), llama_tokenizer(), LLAVA_TEMPLATE),
        "byte-level": Pair(tmp_path_factory.mktemp("byte_level"), byte_level_tokenizer(), HEADER_TEMPLATE),
    }


@pytest.fixture(params=["llama", "byte-level"])
def pair(request, pairs) -> Pair:
    return pairs[request.param]


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["</s>", "<s>", "<|end|>", "<|start|>", "<0x41>", "▁", " ", "  \n", "<imag", "picture"]
        ),
    ),
    max_size=8,
).map("".join)
QUESTIONS = TEXTS.filter(lambda text: text.strip())


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
@settings(max_examples=120, deadline=None)
@given(pieces=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_of_any_text_with_pictures(pairs, kind, pieces):
    text = "<image>".join([*pieces[:-1], pieces[-1] + "?"])
    num_images = len(pieces) - 1
    encoded = pairs[kind].ours.encode(text, TOKENS_PER_IMAGE)
    assert encoded.token_ids.tolist() == pairs[kind].their_ids(text, num_images)
    assert len(encoded.visual_rows) == num_images * TOKENS_PER_IMAGE
    assert encoded.tail_text == pieces[-1] + "?"
    assert encoded.offsets.shape == (len(encoded.token_ids), 2)


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
@settings(max_examples=80, deadline=None)
@given(question=QUESTIONS, num_images=st.integers(0, 3))
def test_chat_of_any_question(pairs, kind, question, num_images):
    assert pairs[kind].ours.render(question, num_images) == pairs[kind].their_chat(question, num_images)
    encoded = pairs[kind].ours.encode_chat(question, [TOKENS_PER_IMAGE] * num_images)
    assert encoded.token_ids.tolist() == pairs[kind].their_chat(question, num_images, tokenize=True)


def test_template_that_begins_with_bos_does_not_get_two(pairs):
    ours = pairs["byte-level"].ours
    begin = ours.format.bos_token_id
    assert ours.encode_chat("what?", [2]).token_ids[:2].tolist().count(begin) == 1
    assert ours.encode(ours.render("what?", 1), 2).token_ids[:2].tolist().count(begin) == 2


def test_placeholders_in_the_prompt_say_where_pictures_are(pair):
    text = pair.ours.render("first <image> then <image> which is red?", 2)
    assert text == pair.their_chat("first <image> then <image> which is red?", 0)
    assert text.count("<image>") == 2
    encoded = pair.ours.encode(text, [3, 5])
    runs = np.split(encoded.visual_rows, np.flatnonzero(np.diff(encoded.visual_rows) > 1) + 1)
    assert [len(run) for run in runs] == [3, 5]


def test_rows_and_offsets(pair):
    encoded = pair.ours.encode("Look: <image>\nhow many cats, Où?", 7)
    assert encoded.text == "Look: " + "<image>" * 7 + "\nhow many cats, Où?"
    assert encoded.token_ids[encoded.visual_rows].tolist() == [pair.ours.format.image_token_id] * 7
    assert np.all(np.diff(encoded.visual_rows) == 1)
    assert encoded.num_text_rows_after_last_image == len(encoded.token_ids) - encoded.visual_rows[-1] - 1
    tail = encoded.tail_offsets
    assert tail.shape == (encoded.num_text_rows_after_last_image, 2)
    covered = np.zeros(len(encoded.tail_text), bool)
    for start, end in tail:
        covered[start:end] = True
    assert "".join(c for c, yes in zip(encoded.tail_text, covered, strict=True) if not yes).strip() == ""
    rows = [encoded.tail_text[start:end].strip() for start, end in tail]
    start = encoded.tail_text.index("cats")
    touching = "".join(text for text, (a, b) in zip(rows, tail, strict=True) if a < start + 4 and b > start)
    assert touching == "cats"


def test_text_without_pictures(pair):
    encoded = pair.ours.encode("how many cats?", ())
    assert encoded.visual_rows.size == 0
    assert encoded.num_text_rows_after_last_image == len(encoded.token_ids)
    assert encoded.tail_text == "how many cats?"
    assert len(encoded.tail_offsets) == len(encoded.token_ids)


def test_truncation_and_padding_of_the_file_are_off(pair, tmp_path):
    tokenizer = Tokenizer.from_file(str(pair.file))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = PromptEncoder(pair.ours.format, tmp_path / "tokenizer.json")
    text = "how many cats are on the table?"
    assert np.array_equal(ours.encode(text, 1).token_ids, pair.ours.encode(text, 1).token_ids)


@pytest.mark.parametrize("prompt", ["", "  \n", "<image>", " <image> <image>"])
def test_empty_prompt(pair, prompt):
    with pytest.raises(PromptError, match="empty"):
        pair.ours.render(prompt, prompt.count("<image>"))


@pytest.mark.parametrize(
    ("prompt", "num_images"), [("<image> what?", 2), ("<image><image> what?", 1), ("<image> a", 0)]
)
def test_more_or_fewer_placeholders_than_pictures(pair, prompt, num_images):
    with pytest.raises(PromptError, match=rf"{prompt.count('<image>')} placeholders.* {num_images} pictures"):
        pair.ours.render(prompt, num_images)
    with pytest.raises(PromptError, match=rf"{prompt.count('<image>')} placeholders.* {num_images} pictures"):
        pair.ours.encode(prompt, [4] * num_images)


def test_no_text_after_the_last_picture(pair):
    with pytest.raises(PromptError, match="ends with a picture"):
        pair.ours.encode("what? <image>", 4)


def test_half_characters(pair):
    with pytest.raises(PromptError, match="UTF-8"):
        pair.ours.encode("what \udcff is it?", ())


def test_context_overflow(pair):
    text = "<image> how many cats?"
    length = len(pair.ours.encode(text, 10).token_ids)
    ours = PromptEncoder(replace(pair.ours.format, context_length=length + 5), pair.file)
    assert len(ours.encode(text, 10, max_new_tokens=5).token_ids) == length
    with pytest.raises(PromptError, match=rf"{length} tokens \(10 of them visual\).* by 1:"):
        ours.encode(text, 10, max_new_tokens=6)


def test_template_that_refuses_or_forgets_pictures(pair):
    def encoder(template: str) -> PromptEncoder:
        return PromptEncoder(replace(pair.ours.format, chat_template=template), pair.file)

    with pytest.raises(PromptError, match="only one picture"):
        encoder("{{ raise_exception('only one picture') }}").render("what?", 2)
    with pytest.raises(PromptError, match="refuses"):
        encoder("{{ messages[0].content + 'x' }}").render("what?", 1)
    with pytest.raises(PromptError, match="wrote 0 placeholders for 1"):
        encoder("{{ messages[0].content[-1].text }}").render("what?", 1)
    with pytest.raises(PromptError, match="refuses"):
        encoder("{{ messages.append(1) }}").render("what?", 1)
    with pytest.raises(BundleError, match="Jinja"):
        encoder("{% for %}")


def test_damaged_tokenizer_files(pair, tmp_path):
    with pytest.raises(BundleError, match="cannot be read"):
        PromptEncoder(pair.ours.format, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="not a tokenizer"):
        PromptEncoder(pair.ours.format, tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="the manifest 7"):
        PromptEncoder(replace(pair.ours.format, image_token_id=7), pair.file)


def test_format_round_trip(pair):
    ours = pair.ours.format
    assert PromptFormat.from_json(json.loads(json.dumps(ours.to_json()))) == ours


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"chat_template": ""}, "chat_template"),
        ({"image_token": None}, "image_token"),
        ({"image_token_id": -1}, "image_token_id"),
        ({"image_token_id": True}, "image_token_id"),
        ({"special_tokens": ["<s>"]}, "special_tokens"),
        ({"special_tokens": {"bos_token": 1}}, "special_tokens"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"eos_token_ids": 2}, "eos_token_ids"),
        ({"eos_token_ids": [2, None]}, "eos_token_ids"),
        ({"pad_token_id": 0.5}, "pad_token_id"),
        ({"context_length": 0}, "context_length"),
    ],
)
def test_invalid_format_is_refused(pairs, change, named):
    with pytest.raises(BundleError, match=named):
        PromptFormat.from_json({**pairs["llama"].ours.format.to_json(), **change})


def test_format_with_a_missing_field_is_refused(pairs):
    data = pairs["llama"].ours.format.to_json()
    del data["context_length"]
    with pytest.raises(BundleError, match="context_length"):
        PromptFormat.from_json(data)


@pytest.fixture(scope="module")
def tokenizers(pairs) -> dict[str, Tokenizer]:
    by_name = {name: pair.ours.tokenizer for name, pair in pairs.items()}
    return {**by_name, "unigram": unigram_tokenizer()}


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@pytest.mark.parametrize("kind", ["llama", "byte-level", "unigram"])
@settings(max_examples=300, deadline=None)
@given(draws=st.lists(st.integers(0, 1000), max_size=40))
def test_pieces_of_any_ids_are_the_whole_text(tokenizers, kind, draws):
    tokenizer = tokenizers[kind]
    ids = [draw % (tokenizer.get_vocab_size() + 3) for draw in draws]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_any_text_hold_whole_characters(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_pieces_come_as_soon_as_they_are_certain(tokenizers):
    for kind in ("llama", "byte-level"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("how many cats 🙂 there", add_special_tokens=False).ids
        pieces = stream(tokenizer, ids)
        assert "".join(pieces[:2]) != ""  # the first may be the space that is never shown
        assert pieces[-1] == ""
        smile = [piece for piece in pieces if "🙂" in piece]
        assert len(smile) == 1
        assert pieces[pieces.index(smile[0]) - 1] == ""  # three bytes were withheld before it


def test_special_token_between_words_keeps_the_space(tokenizers):
    tokenizer = tokenizers["llama"]
    cats = tokenizer.encode("many", add_special_tokens=False).ids
    end = tokenizer.token_to_id("</s>")
    assert "".join(stream(tokenizer, [*cats, end, *cats])) == "many many"


def test_decoding_does_not_slow_down_with_the_length(tokenizers):
    tokenizer = tokenizers["byte-level"]
    longest = 0

    class Spy:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, skip_special_tokens):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = tokenizer.encode("how many cats 🙂 are on the table? " * 50, add_special_tokens=False).ids
    assert "".join(stream(Spy(), ids)) == tokenizer.decode(ids)
    assert longest <= 10


def test_runtime_needs_neither_torch_nor_transformers():
    modules = ("preprocessing", "prompt", "sampling", "overlay")
    code = f"""import sys
sys.modules["torch"] = sys.modules["transformers"] = None
for name in {modules}:
    __import__("edgeprune.runtimes." + name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
