"""Prompts of InternVL: the ids of transformers' processor, with <img> and </img> round the tokens of a picture."""

import json

import pytest
from PIL import Image
from tiny_checkpoints import edit_json
from tiny_internvl import CHAT_TEMPLATE, IMAGE_TOKEN_ID, TinyInternvl, internvl_processor

from edgeprune.errors import BundleError, CheckpointError, PromptError
from edgeprune.export.prompt import prompt_format_from_checkpoint, tokenizer_json_from_checkpoint
from edgeprune.runtimes.prompt import PromptEncoder, PromptFormat
from edgeprune.runtimes.tiling import TilePreprocessing

SIZES = [(60, 40), (24, 24), (20, 90)]
QUESTIONS = ["What is it?", " Größe 猫 🙂 ", "A <img> B </img> C"]


class Pair:
    """transformers' processor, and ours from the files that its parts save."""

    def __init__(self, folder, text: str) -> None:
        self.theirs = internvl_processor(TinyInternvl(text=text))
        self.theirs.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        self.folder = folder
        self.config = {
            "model_type": "internvl",
            "image_token_id": IMAGE_TOKEN_ID,
            "text_config": {"model_type": "qwen2"},
        }
        (folder / "tokenizer.json").write_text(tokenizer_json_from_checkpoint(folder))
        self.ours = PromptEncoder(self.format(), folder / "tokenizer.json")

    def format(self) -> PromptFormat:
        return prompt_format_from_checkpoint(self.folder, self.config)


@pytest.fixture(params=["qwen2", "llama"])
def pair(request, tmp_path):
    return Pair(tmp_path, request.param)


def tokens_of(pair, images):
    """9 visual tokens a tile, as many tiles as transformers' processor counts."""
    settings = {"crop_to_patches": True}
    count = pair.theirs.image_processor.get_number_of_image_patches
    return [9 * count(image.height, image.width, settings) for image in images]


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
@pytest.mark.parametrize("question", QUESTIONS)
def test_chats_have_the_ids_of_transformers(pair, question, num_images):
    images = [Image.new("RGB", size) for size in SIZES[:num_images]]
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    theirs = pair.theirs.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    encoded = pair.ours.encode_chat(question, tokens_of(pair, images))
    assert encoded.token_ids.tolist() == list(theirs)
    assert len(encoded.visual_rows) == sum(tokens_of(pair, images))


def test_placeholders_inside_the_question(pair):
    images = [Image.new("RGB", size) for size in SIZES[:2]]
    text = "Is <IMG_CONTEXT> more than <IMG_CONTEXT>? Yes or no."
    theirs = pair.theirs(text=text, images=images)["input_ids"][0]
    encoded = pair.ours.encode(text, tokens_of(pair, images))
    assert encoded.token_ids.tolist() == list(theirs)
    assert encoded.tail_text == "? Yes or no."
    assert pair.ours.tokenizer.decode(encoded.token_ids[encoded.visual_rows[0] - 1 :][:1], False) == "<img>"


def test_counts_are_those_of_the_pictures_as_prepared(pair):
    from test_tiling import tile

    images = [Image.new("RGB", size) for size in SIZES]
    layout = TilePreprocessing(tile(), 1, 4).prepare(images, (3, 3)).layout
    assert list(layout.tokens_per_image) == tokens_of(pair, images)


def test_format(pair):
    format_ = pair.format()
    assert (format_.image_prefix, format_.image_suffix, format_.image_token) == (
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
    )
    assert format_.context_length == 32768
    assert PromptFormat.from_json(json.loads(json.dumps(format_.to_json()))) == format_
    with pytest.raises(BundleError, match="lacks fields image_prefix"):
        PromptFormat.from_json({k: v for k, v in format_.to_json().items() if k != "image_prefix"})
    for prefix in (3, "<IMG_CONTEXT>"):
        with pytest.raises(BundleError, match="image_prefix must be a text without the image token"):
            PromptFormat.from_json({**format_.to_json(), "image_prefix": prefix})


def test_placeholders_that_do_not_fit_are_refused(pair):
    with pytest.raises(PromptError, match="2 placeholders '<IMG_CONTEXT>' for 1 pictures"):
        pair.ours.encode_chat("<IMG_CONTEXT> or <IMG_CONTEXT>?", [9])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start_image_token": ...}, "names no start_image_token, which InternVL's processor needs"),
        ({"end_image_token": "<nothing>"}, "lacks end_image_token '<nothing>'"),
        ({"context_image_token": "<image>"}, "names the image token '<image>', but config.json's"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(pair, fields, message):
    edit_json(pair.folder / "tokenizer_config.json", **fields)
    with pytest.raises(CheckpointError) as error:
        pair.format()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
