"""The table of what fits a Jetson is the one in the document."""

from pathlib import Path

from jetson_memory import MODELS, SEQUENCE, rows

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "jetson.md"


def test_the_document_shows_what_is_estimated():
    assert "\n".join(rows()) in DOCUMENT.read_text(encoding="utf-8")


def test_the_models_have_the_sizes_of_their_names():
    billions = {model.name: (model.quantized_weights() + model.other_weights()) / 1e9 for model in MODELS}
    # Tied embeddings are counted twice, as two engines hold them.
    named = {
        "InternVL3-1B": 0.94,
        "Qwen2-VL-2B": 2.21 + 0.23,
        "Qwen2.5-VL-3B": 3.75 + 0.31,
        "Qwen3-VL-2B": 2.13 + 0.31,
        "Qwen3-VL-4B": 4.44 + 0.39,
        "LLaVA-1.5-7B": 7.06,
    }
    for name, expected in named.items():
        assert abs(billions[name] / expected - 1) < 0.02, (name, billions[name])


def test_the_cache_is_two_buffers_of_keys_and_values():
    llava = MODELS[-1].estimate("float16")
    assert llava.kv_cache == 2 * (2 * 32 * 32 * 128 * SEQUENCE * 2)
