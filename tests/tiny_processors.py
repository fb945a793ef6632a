"""Processors of LLaVA checkpoints with tokenizers that are trained on a few sentences."""

import json
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from edgeprune.export.prompt import prompt_format_from_checkpoint
from edgeprune.runtimes.prompt import PromptEncoder

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
