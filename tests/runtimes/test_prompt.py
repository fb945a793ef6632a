"""Prompts are rendered and tokenized as by transformers' LlavaProcessor."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_processors import (
    HEADER_TEMPLATE,
    LLAVA_TEMPLATE,
    TOKENS_PER_IMAGE,
    Pair,
    byte_level_tokenizer,
    llama_tokenizer,
)
from tokenizers import Tokenizer

from edgeprune.errors import BundleError, PromptError
from edgeprune.runtimes.prompt import PromptEncoder, PromptFormat


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {
        "llama": Pair(tmp_path_factory.mktemp("llama"), llama_tokenizer(), LLAVA_TEMPLATE),
        "byte-level": Pair(tmp_path_factory.mktemp("byte_level"), byte_level_tokenizer(), HEADER_TEMPLATE),
    }


@pytest.fixture(params=["llama", "byte-level"])
def pair(request, pairs) -> Pair:
    return pairs[request.param]


# Hypothesis draws constants of the tests, too, among them the placeholder.
TEXTS = (
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.sampled_from(
                ["</s>", "<s>", "<|end|>", "<|start|>", "<0x41>", "▁", " ", "  \n", "<imag", "picture"]
            ),
        ),
        max_size=8,
    )
    .map("".join)
    .filter(lambda text: "<image>" not in text)
)
QUESTIONS = TEXTS.filter(lambda text: text.strip())


@pytest.mark.parametrize(("kind", "between"), [("llama", " "), ("byte-level", "")])
def test_an_answer_stands_behind_the_rendered_question(pairs, kind, between):
    ours = pairs[kind].ours
    # Their processor would add the token that the template begins with a second time.
    text = ours.render("what is it?", 1).removeprefix(ours.format.special_tokens.get("bos_token", ""))
    for answer, added in (("a cat", between), (" a cat", "")):
        expected = pairs[kind].their_ids(f"{text}{added}{answer}", 1)
        got = ours.encode_chat("what is it?", [TOKENS_PER_IMAGE], answer=answer).token_ids
        assert got.tolist() == expected
        if not text[-1].isspace():
            # A byte-level tokenizer joins a space at the prompt's end with the word behind it.
            prompt = ours.encode_chat("what is it?", [TOKENS_PER_IMAGE]).token_ids
            assert got[: len(prompt)].tolist() == prompt.tolist()


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


def test_runtime_needs_neither_torch_nor_transformers():
    modules = ("preprocessing", "prompt", "sampling", "overlay")
    code = f"""import sys
sys.modules["torch"] = sys.modules["transformers"] = None
for name in {modules}:
    __import__("edgeprune.runtimes." + name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
