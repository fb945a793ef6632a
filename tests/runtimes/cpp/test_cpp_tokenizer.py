"""The C++ tokenizer gives the ids, the offsets and the texts of the tokenizers library."""

import json
import random
from pathlib import Path

import pytest
from tiny_checkpoints import clip_tokenizer
from tiny_processors import byte_level_tokenizer, llama_tokenizer, unigram_tokenizer
from tiny_qwen import qwen_tokenizer
from tokenizers import Tokenizer

from edgeprune.runtimes.incremental_decoder import IncrementalDecoder

SHAPES = Path(__file__).resolve().parents[3] / "examples" / "shapes"
NUM_TEXTS = 1000
TEXT = (
    "which letter is in the green diamond? How many BÜCHER Größe don't WE'LL 'ſ I'm 1234 12½ ٣ … ÀÉ x_y a-b (c) "
    "图片里有什么 猫 🙂🙃 👩\u200d👩\u200d👧 한국어 हिन्दी "
    "עברית İstanbul ﬁ e\u0301 A\u030a\u1100\u1161\u11a8 a\u0316\u0315b "
    "<image> <s> </s> <|startoftext|> <|im_end|> <0x0A> ▁ Ġ \u200b\u3000 https://a.b/c?d=e&f"
)
WORDS = TEXT.split(" ")
SPACES = (" ", " ", " ", "", "  ", "\n", "\t", "\r\n", "\u3000", " \n ")


def texts(seed: int) -> list[str]:
    """Words of many scripts with odd spaces, and random characters."""
    rng = random.Random(seed)
    ranges = ((1, 0x24F), (0x300, 0x1FFF), (0x2000, 0x33FF), (0x4E00, 0xD7FF), (0xE000, 0x1FFFF))
    found = ["", " ", "a", "<image>"]
    while len(found) < NUM_TEXTS:
        if rng.random() < 0.7:
            number = rng.choice((3, 10, 60))
            found.append(
                "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randint(1, number)))
            )
        else:
            found.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 30))))
    return found


def legacy_llama() -> str:
    """Llama's tokenizer as older conversions write it: a normalizer instead of Metaspace."""
    data = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    data["pre_tokenizer"] = None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    return json.dumps(data)


TOKENIZERS = {
    "example": lambda: (SHAPES / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"),
    "example's CLIP": lambda: (SHAPES / "clip" / "tokenizer.json").read_text(encoding="utf-8"),
    "CLIP": lambda: clip_tokenizer().backend_tokenizer.to_str(),
    "byte level": lambda: byte_level_tokenizer().backend_tokenizer.to_str(),
    "Llama": lambda: llama_tokenizer().backend_tokenizer.to_str(),
    "legacy Llama": legacy_llama,
    "Qwen2": lambda: qwen_tokenizer().backend_tokenizer.to_str(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_offsets_and_texts_of_1000_strings_are_those_of_tokenizers(cpp, name, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name](), encoding="utf-8")
    theirs = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    theirs.no_truncation()
    theirs.no_padding()
    requests = [{"text": text, "special": index % 2 == 0} for index, text in enumerate(texts(len(name)))]
    found = cpp.parts("tokenize", requests, path)
    for request, result in zip(requests, found, strict=True):
        expected = theirs.encode(request["text"], add_special_tokens=request["special"])
        assert result["ids"] == expected.ids, request
        assert result["offsets"] == [list(span) for span in expected.offsets], request
        assert result["text"] == theirs.decode(expected.ids), request


@pytest.mark.parametrize("name", ["byte level", "Llama", "Qwen2"])
def test_pieces_of_random_tokens_are_pythons(cpp, name, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name](), encoding="utf-8")
    theirs = Tokenizer.from_file(str(path))
    rng = random.Random(7)
    size = theirs.get_vocab_size()
    rows = [[rng.randrange(size + 5) for _ in range(rng.randint(1, 30))] for _ in range(300)]
    found = cpp.parts("tokenize", [{"text": "", "special": False, "ids": ids} for ids in rows], path)
    for ids, result in zip(rows, found, strict=True):
        decoder = IncrementalDecoder(theirs)
        assert result["pieces"] == [*map(decoder.push, ids), decoder.finish()], ids


def test_another_model_is_refused_by_name(cpp, tmp_path):
    path = tmp_path / "tokenizer.json"
    unigram_tokenizer().save(str(path))
    ran = cpp.run(cpp.built.folder / "tests" / "parts", "tokenize", path)
    assert ran.returncode == 1
    assert "'Unigram' is not supported" in json.loads(ran.stdout)["error"]


def test_the_tables_of_characters_are_those_of_tokenizers():
    import importlib.util

    source = Path(__file__).resolve().parents[3] / "runtimes" / "cpp" / "tools" / "write_unicode_tables.py"
    spec = importlib.util.spec_from_file_location("write_unicode_tables", source)
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    written = writer.TARGET.read_text(encoding="utf-8")
    # Decompositions are Python's own and grow with its version.
    for table in (
        writer.table("Range", "kLetters", writer.ranges(writer.members(r"\p{L}"))),
        writer.table("Range", "kNumbers", writer.ranges(writer.members(r"\p{N}"))),
        writer.table("Lower", "kLower", writer.lower_cases()),
    ):
        assert table in written
