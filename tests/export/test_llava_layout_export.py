"""A checkpoint that LLaVA's own code has saved becomes a bundle that answers as that code asks."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_llava_layout import NUM_TOKENS, SPEC, BothLayouts, build_both, tokenizer, with_config
from tiny_llava_next import pictures
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaImageProcessorPil

from edgeprune.checkpoint import load_checkpoint, read_config
from edgeprune.errors import CheckpointError
from edgeprune.export import llava_layout
from edgeprune.export.exporter import export
from edgeprune.export.prompt import prompt_format_from_checkpoint
from edgeprune.prune.fastv import FastV
from edgeprune.runtimes.preprocessing import ImagePreprocessing
from edgeprune.runtimes.prompt import PromptEncoder
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import open_session
from edgeprune.runtimes.square_padding import SquarePadding
from edgeprune.verification import verify

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> BothLayouts:
    return build_both(tmp_path_factory.mktemp("both"))


def asked_by_llava(question: str, num_images: int) -> list[int]:
    """As LLaVA's code tokenizes: pieces between pictures by themselves, the first token of later ones left out."""
    slow = tokenizer()
    text = f"{SYSTEM} USER: {'<image>' + chr(10) if num_images else ''}{question} ASSISTANT:"
    if num_images > 1:
        text = text.replace("<image>\n", "<image>\n" * num_images)
    first, *more = [slow(piece)["input_ids"] for piece in text.split("<image>")]
    ids = list(first)
    for piece in more:
        ids += [NUM_TOKENS] * SPEC.num_patches + piece[1:]
    return ids


def test_answers_are_those_of_transformers_asked_as_llava_does(both, tmp_path):
    bundle = export(both.outside, tmp_path / "bundle", clip=both.clip, methods=[FastV(layer=2, keep=9)])
    assert bundle.manifest.source.model_type == "llava"
    found = verify(bundle.path, checkpoint=both.outside, clip=both.clip)
    assert set(found.parity) == set(bundle.manifest.graphs)
    processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": SPEC.image_size},
        crop_size={"height": SPEC.image_size, "width": SPEC.image_size},
    )
    theirs = LlavaForConditionalGeneration.from_pretrained(both.transformers, dtype=torch.float32).eval()
    with open_session(bundle.path, threads=1) as session:
        for sizes in ([], [(60, 40)], [(30, 70), (24, 24)]):
            images = pictures(sizes, seed=len(sizes))
            counts = [SPEC.num_patches] * len(images)
            encoded = session.prompts.encode_chat("What is it?", counts)
            assert encoded.token_ids.tolist() == asked_by_llava("What is it?", len(images))
            answer = session.answer(images, "What is it?", SamplingOptions(max_new_tokens=4))
            if images:
                assert answer.sites[0].kept == 9 * len(images)
                expected = processor(images, return_tensors="np")["pixel_values"]
                ours = session.preprocessing.prepare(images, (6, 6)).pixel_values
                assert np.abs(ours - expected).max() <= 1e-5
                continue
            # Without a picture nothing is pruned.
            ids = encoded.token_ids
            for token in answer.token_ids:
                with torch.no_grad():
                    logits = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0, -1, :NUM_TOKENS]
                assert int(logits.argmax()) == token
                ids = np.append(ids, token)


def test_text_around_pictures(both):
    """Placeholders inside the question too: each piece begins anew."""
    config = read_config(both.inside, both.clip)
    prompts = encoder(both.inside, config, both.inside)
    slow = tokenizer()
    for text in ("a red square", "<image>\na red square", "two  cats<image>two <image>\n<image>cats"):
        first, *more = [slow(piece)["input_ids"] for piece in text.split("<image>")]
        expected = [*first, *(token for piece in more for token in (NUM_TOKENS, NUM_TOKENS, *piece[1:]))]
        assert prompts.encode(text, [2] * text.count("<image>")).token_ids.tolist() == expected
    # SentencePiece puts ▁ before a space, too; transformers 5 does not.
    ids = prompts.encode("a<image> b", [2]).token_ids.tolist()
    assert slow.convert_ids_to_tokens(ids[4:]) == ["▁", "▁", "b"]


def encoder(folder, config, path) -> PromptEncoder:
    text = llava_layout.tokenizer_json_of(folder, config)
    (path / "bundle-tokenizer.json").write_text(text)
    return PromptEncoder(prompt_format_from_checkpoint(folder, config, text), path / "bundle-tokenizer.json")


def test_a_template_of_the_checkpoint_comes_first(both, tmp_path):
    folder = with_config(both.inside, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}!")
    config = read_config(folder, both.clip)
    assert encoder(folder, config, tmp_path).render("What?", 0) == "What?!"


def test_pixels_by_image_aspect_ratio(both, tmp_path):
    image = pictures([(60, 40)])[0]
    side = SPEC.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    crop = CLIPImageProcessor(**sizes)
    for aspect, kind, prepared in (
        ("pad", SquarePadding, None),
        ("resize", ImagePreprocessing, image.resize((side, side))),
        ("square", ImagePreprocessing, image),
        (None, ImagePreprocessing, image),
    ):
        config = {**read_config(both.inside, both.clip), "image_aspect_ratio": aspect}
        ours = llava_layout.preprocessing_of(both.inside, config, both.clip)
        assert isinstance(ours, kind)
        if prepared is not None:
            expected = crop(prepared, return_tensors="np")["pixel_values"]
            assert np.abs(ours.prepare([image], (6, 6)).pixel_values - expected).max() <= 1e-5


def test_preprocessing_of_a_known_tower_needs_no_folder(both):
    config = read_config(both.inside)
    ours = llava_layout.preprocessing_of(both.inside, config, None)
    assert isinstance(ours, SquarePadding)
    assert ours.crop.input_size == (336, 336)
    assert ours.fill == (122, 116, 104)
    assert ours.to_rgb(Image.new("L", (3, 3))).mode == "RGB"


def test_a_processor_that_does_not_fit_the_tower(both, tmp_path):
    folder = with_config(both.inside, tmp_path / "copy")
    CLIPImageProcessor().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="pictures of 224 × 224, the vision tower takes 24 × 24"):
        llava_layout.preprocessing_of(folder, read_config(folder, both.clip), both.clip)


def test_a_tokenizer_smaller_than_the_embeddings(both, tmp_path):
    """Embeddings may be padded; the placeholder lies behind them."""
    folder = with_config(both.inside, tmp_path / "copy", vocab_size=NUM_TOKENS + 12)
    config = read_config(folder, both.clip)
    prompts = encoder(folder, config, tmp_path)
    assert prompts.format.image_token_id == NUM_TOKENS + 12
    assert prompts.encode("<image> a", [3]).token_ids.tolist()[1:4] == [NUM_TOKENS + 12] * 3


def test_a_tokenizer_that_does_not_fit(both, tmp_path):
    folder = with_config(both.inside, tmp_path / "copy", vocab_size=NUM_TOKENS - 5)
    with pytest.raises(
        CheckpointError, match=f"tokenizer of {NUM_TOKENS} tokens for embeddings of {NUM_TOKENS - 5}"
    ):
        llava_layout.tokenizer_json_of(folder, read_config(folder, both.clip))


def test_a_tokenizer_that_has_the_placeholder(both, tmp_path):
    folder = with_config(both.inside, tmp_path / "copy", vocab_size=NUM_TOKENS + 4)
    own = tokenizer()
    own.add_tokens(["<image>"], special_tokens=True)
    own.save_pretrained(folder)
    config = read_config(folder, both.clip)
    assert config["image_token_index"] == NUM_TOKENS
    assert encoder(folder, config, tmp_path).format.image_token_id == NUM_TOKENS


def test_weights_in_bin_files_are_converted_as_the_documents_say(both, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    folder = with_config(both.inside, tmp_path / "llava-v1.5-7b")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[:30], sorted(weights)[30:])):
        torch.save(
            {name: weights[name] for name in names}, folder / f"pytorch_model-0000{number + 1}-of-00002.bin"
        )
    with pytest.raises(CheckpointError, match=r"holds \.bin weights"):
        load_checkpoint(folder, clip=both.clip)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "families.md", "exec"), {"__name__": __name__})
    loaded = load_checkpoint(folder, clip=both.clip).model.state_dict()
    expected = load_checkpoint(both.inside, clip=both.clip).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_with_the_slow_tokenizer_alone(both, tmp_path):
    """tokenizer.model takes SentencePiece to be read, or the message says so."""
    folder = with_config(both.inside, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05")
    with pytest.raises(CheckpointError, match=r"pip install sentencepiece|use_fast=True") as error:
        export(folder, tmp_path / "bundle", clip=both.clip)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == NUM_TOKENS
