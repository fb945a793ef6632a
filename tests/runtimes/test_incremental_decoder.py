"""Text that comes in pieces is the text that the tokenizer makes of all ids at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_processors import byte_level_tokenizer, llama_tokenizer, unigram_tokenizer
from tokenizers import Tokenizer

from edgeprune.runtimes.prompt import IncrementalDecoder


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "llama": llama_tokenizer().backend_tokenizer,
        "byte-level": byte_level_tokenizer().backend_tokenizer,
        "unigram": unigram_tokenizer(),
    }


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
