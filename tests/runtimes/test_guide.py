import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CLIP_BOS, CLIP_CONTEXT_LENGTH, CLIP_EOS, CORPUS, clip_tokenizer, llava_tokenizer
from tokenizers import Tokenizer

from edgeprune.errors import BundleError
from edgeprune.runtimes.guide import GuideEncoder

CLIP = clip_tokenizer().backend_tokenizer
LLAVA = llava_tokenizer().backend_tokenizer
START, END = CLIP.token_to_id(CLIP_BOS), CLIP.token_to_id(CLIP_EOS)
texts = st.lists(
    st.sampled_from([*" ".join(CORPUS).split(), "ÄÖ", "été", "猫", "🙂", "\n", "ASSISTANT:"])
).map(" ".join)


@pytest.fixture(scope="module")
def clip_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("guide") / "tokenizer.json"
    CLIP.save(str(path))
    return path


@pytest.fixture(scope="module")
def encoder(clip_json):
    return GuideEncoder(clip_json, CLIP_CONTEXT_LENGTH)


def llava_offsets(text):
    return np.array(LLAVA.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)


def characters(span):
    return set(range(span[0], span[1]))


@given(texts)
@settings(max_examples=60, deadline=None)
def test_alignment_character_by_character(encoder, text):
    offsets = llava_offsets(text)
    guide = encoder.encode(text, offsets)
    clip_spans = [characters(span) for span in CLIP.encode(text, add_special_tokens=False).offsets]
    room = CLIP_CONTEXT_LENGTH - 2
    assert guide.token_map.shape == (len(offsets), guide.input_ids.size)
    for row, span in zip(guide.token_map, offsets, strict=True):
        sharing = [i for i, clip_span in enumerate(clip_spans) if clip_span & characters(span)]
        # Token i of the text is token i % room of chunk i // room, behind the chunk's start token.
        columns = [i // room * CLIP_CONTEXT_LENGTH + 1 + i % room for i in sharing]
        assert np.flatnonzero(row).tolist() == columns
        assert row[columns] == pytest.approx(1 / max(len(columns), 1))


@pytest.mark.parametrize("num_tokens", [0, 1, 74, 75, 76, 149, 150, 151, 400])
def test_long_texts_become_chunks(encoder, num_tokens):
    text = " ".join(["circle"] * num_tokens)
    ids = CLIP.encode(text, add_special_tokens=False).ids
    assert len(ids) == num_tokens
    guide = encoder.encode(text, llava_offsets(text))
    assert guide.input_ids.dtype == np.int64
    assert guide.input_ids.shape == (max(1, -(-num_tokens // 75)), CLIP_CONTEXT_LENGTH)
    assert (guide.input_ids[:, 0] == START).all()
    assert (guide.input_ids[:, -1] == END).all()
    assert guide.input_ids[:, 1:-1].reshape(-1)[:num_tokens].tolist() == ids
    assert (guide.input_ids[:, 1:].reshape(-1) == END).sum() == guide.input_ids[:, 1:].size - num_tokens


def test_short_text_is_what_transformers_encodes(encoder):
    expected = clip_tokenizer()(CORPUS[2])["input_ids"]
    guide = encoder.encode(CORPUS[2], llava_offsets(CORPUS[2]))
    assert guide.input_ids[0, : len(expected)].tolist() == expected
    assert (guide.input_ids[0, len(expected) :] == END).all()


def test_added_tokens_without_characters_have_no_clip_tokens(encoder):
    offsets = np.array([[0, 0], [0, 3], [3, 3]], np.int64)
    assert encoder.encode("red", offsets).token_map.any(axis=1).tolist() == [False, True, False]


def test_truncation_and_padding_in_the_file_are_ignored(clip_json, encoder, tmp_path):
    """Files saved after a tokenizer was used carry the settings of that use."""
    used = Tokenizer.from_file(str(clip_json))
    used.enable_truncation(5)
    used.enable_padding(length=90, pad_id=3)
    used.save(str(tmp_path / "used.json"))
    text = " ".join(CORPUS)
    expected = encoder.encode(text, llava_offsets(text))
    guide = GuideEncoder(tmp_path / "used.json", CLIP_CONTEXT_LENGTH).encode(text, llava_offsets(text))
    assert np.array_equal(guide.input_ids, expected.input_ids)
    assert np.array_equal(guide.token_map, expected.token_map)


def test_other_tokenizer(tmp_path):
    LLAVA.save(str(tmp_path / "llava.json"))
    with pytest.raises(BundleError, match="it is not CLIP's tokenizer"):
        GuideEncoder(tmp_path / "llava.json", CLIP_CONTEXT_LENGTH)


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"model": 3})])
def test_damaged_file(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(BundleError, match="is not a tokenizer") as caught:
        GuideEncoder(tmp_path / "broken.json", CLIP_CONTEXT_LENGTH)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(BundleError, match="is not a tokenizer"):
        GuideEncoder(tmp_path / "missing.json", CLIP_CONTEXT_LENGTH)
