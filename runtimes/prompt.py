"""From a question to token ids and from token ids back to text, without transformers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgeprune.errors import BundleError, PromptError
from edgeprune.runtimes.chat_template import ChatTemplate
from edgeprune.runtimes.incremental_decoder import IncrementalDecoder
from edgeprune.runtimes.settings_json import fields_from_json, fields_to_json

_SURROGATE = re.compile("[\ud800-\udfff]")
# The placeholder of a video in Qwen's tokenizers; no graph takes one.
_VIDEO_TOKEN = "<|video_pad|>"

__all__ = ["EncodedPrompt", "IncrementalDecoder", "PromptEncoder", "PromptFormat"]


@dataclass(frozen=True)
class PromptFormat:
    """How a model wants to be asked.

    Which special tokens are put around a text is not here: the tokenizer file's post-processor says it.

    Attributes:
        chat_template: Jinja source, as transformers renders it.
        image_token: The placeholder of one visual token in the text.
        image_token_id: Its id.
        special_tokens: Names that the template may use, such as ``bos_token``, with their texts.
        bos_token_id: Or None.
        eos_token_ids: Each of them ends the answer.
        pad_token_id: Or None.
        context_length: Most tokens, of prompt and answer together, that the decoder takes.
        image_prefix: Text in front of the visual tokens of each picture.
        image_suffix: Text behind them.
    """

    chat_template: str
    image_token: str
    image_token_id: int
    special_tokens: Mapping[str, str]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    context_length: int
    image_prefix: str = ""
    image_suffix: str = ""

    def __post_init__(self) -> None:
        tokens = self.special_tokens
        ids = self.eos_token_ids
        for name, valid, expected in (
            ("chat_template", isinstance(self.chat_template, str) and self.chat_template, "a text"),
            ("image_token", isinstance(self.image_token, str) and self.image_token, "a text"),
            ("image_token_id", _is_id(self.image_token_id), "a token id"),
            ("special_tokens", isinstance(tokens, Mapping) and _are_texts(tokens), "names with their texts"),
            ("bos_token_id", self.bos_token_id is None or _is_id(self.bos_token_id), "a token id or null"),
            ("eos_token_ids", isinstance(ids, tuple) and all(map(_is_id, ids)), "a list of token ids"),
            ("pad_token_id", self.pad_token_id is None or _is_id(self.pad_token_id), "a token id or null"),
            ("context_length", _is_id(self.context_length) and self.context_length, "a positive integer"),
            ("image_prefix", self._surrounds(self.image_prefix), "a text without the image token"),
            ("image_suffix", self._surrounds(self.image_suffix), "a text without the image token"),
        ):
            if not valid:
                raise BundleError(f"prompt format {name} must be {expected}, not {getattr(self, name)!r}")

    def _surrounds(self, text: object) -> bool:
        return isinstance(text, str) and str(self.image_token) not in text

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PromptFormat":
        """Read what :meth:`to_json` wrote.

        Raises:
            BundleError: A field is unknown, missing or invalid.
        """
        return cls(**fields_from_json(cls, data, "prompt format"))

    def to_json(self) -> dict[str, Any]:
        """All fields, as plain JSON."""
        return {**fields_to_json(self), "special_tokens": dict(self.special_tokens)}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
        token_ids: [S] int64.
        offsets: [S, 2] int64, start and end of each token in ``text``; (0, 0) for added special tokens.
        text: With every image placeholder repeated for its visual tokens.
        tail_start: Where in ``text`` the text after the last picture begins; 0 without pictures.
        image_token_id: Id of the visual tokens.
    """

    token_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    text: str
    tail_start: int
    image_token_id: int

    @property
    def visual_rows(self) -> NDArray[np.int64]:
        """Rows of the visual tokens [N], ascending."""
        return np.flatnonzero(self.token_ids == self.image_token_id)

    @property
    def num_text_rows_after_last_image(self) -> int:
        """Rows after the last visual token; all rows without pictures."""
        visual = self.visual_rows
        return len(self.token_ids) - (int(visual[-1]) + 1 if visual.size else 0)

    @property
    def tail_text(self) -> str:
        """The text after the last picture."""
        return self.text[self.tail_start :]

    @property
    def tail_offsets(self) -> NDArray[np.int64]:
        """Start and end in ``tail_text`` of each token after the last picture [T, 2]."""
        tail = self.offsets[len(self.offsets) - self.num_text_rows_after_last_image :]
        return np.clip(tail - self.tail_start, 0, len(self.tail_text))


class PromptEncoder:
    """Renders and tokenizes prompts as transformers' ``LlavaProcessor`` does.

    Attributes:
        format: How the model wants to be asked.
        built_for: Most tokens, of prompt and answer together, that the graphs were built for; None = no limit but the
            model's.
        tokenizer: The bundle's tokenizer, without truncation and padding.
    """

    def __init__(
        self,
        format: PromptFormat,  # noqa: A002 - its name
        tokenizer_json_path: str | Path,
        *,
        built_for: int | None = None,
    ) -> None:
        self.format = format
        self.built_for = built_for
        self.tokenizer = _read_tokenizer(Path(tokenizer_json_path))
        if self.tokenizer.token_to_id(format.image_token) != format.image_token_id:
            raise BundleError(
                f"{tokenizer_json_path} gives {format.image_token!r} the id "
                f"{self.tokenizer.token_to_id(format.image_token)}, the manifest {format.image_token_id}: "
                "export the bundle again"
            )
        self._template = ChatTemplate(format.chat_template)

    def render(self, prompt: str, num_images: int) -> str:
        """Put a question about pictures into the chat template.

        The pictures come before the text, unless the prompt itself says with placeholders where they are.

        Raises:
            PromptError: The prompt is empty, its placeholders are not as many as the pictures, or it asks about a
                video.
        """
        image_token = self.format.image_token
        if not prompt.replace(image_token, "").strip():
            raise PromptError("the prompt is empty: write a question about the picture")
        if _VIDEO_TOKEN in prompt and self.tokenizer.token_to_id(_VIDEO_TOKEN) is not None:
            raise PromptError(
                f"the prompt has {_VIDEO_TOKEN!r}, the placeholder of a video: ask about pictures, such as some of "
                "its frames"
            )
        num_placeholders = prompt.count(image_token)
        if num_placeholders not in (0, num_images):
            raise PromptError(
                f"the prompt has {num_placeholders} placeholders {image_token!r} for {num_images} pictures: "
                "write one for each picture, or none to put the pictures before the text"
            )
        content = [{"type": "image"}] * (num_images - num_placeholders) + [{"type": "text", "text": prompt}]
        text = self._template.render(content, self.format.special_tokens)
        if text.count(image_token) != num_images:
            raise PromptError(
                f"the model's chat template wrote {text.count(image_token)} placeholders for {num_images} "
                f"pictures: write {image_token!r} into the prompt where each picture belongs"
            )
        return text

    def encode(
        self,
        text: str,
        tokens_per_image: int | Sequence[int],
        *,
        max_new_tokens: int = 0,
        add_special_tokens: bool = True,
    ) -> EncodedPrompt:
        """Expand the image placeholders and tokenize.

        Args:
            text: A rendered prompt.
            tokens_per_image: Visual tokens of each picture; one number for all, or one per placeholder.
            max_new_tokens: Room that the context must have for the answer.
            add_special_tokens: Let the tokenizer's post-processor add its tokens.

        Raises:
            PromptError: The placeholders are not as many as the pictures, there is no text after the last
                one, or the context is too short.
        """
        if _SURROGATE.search(text):
            raise PromptError("the prompt holds halves of characters: decode it as UTF-8 before asking")
        pieces = text.split(self.format.image_token)
        num_images = len(pieces) - 1
        counts = (
            [tokens_per_image] * num_images if isinstance(tokens_per_image, int) else list(tokens_per_image)
        )
        if len(counts) != num_images:
            raise PromptError(
                f"the text has {num_images} placeholders {self.format.image_token!r} for {len(counts)} "
                "pictures: write one for each picture"
            )
        prefix, suffix = self.format.image_prefix, self.format.image_suffix
        head = "".join(
            piece + prefix + self.format.image_token * n + suffix
            for piece, n in zip(pieces[:-1], counts, strict=True)
        )
        expanded = head + pieces[-1]
        encoding = self.tokenizer.encode(expanded, add_special_tokens=add_special_tokens)
        encoded = EncodedPrompt(
            token_ids=np.array(encoding.ids, np.int64),
            offsets=np.array(encoding.offsets, np.int64).reshape(-1, 2),
            text=expanded,
            tail_start=len(head),
            image_token_id=self.format.image_token_id,
        )
        self._check(encoded, sum(counts), max_new_tokens)
        return encoded

    def encode_chat(
        self, prompt: str, tokens_per_image: Sequence[int], max_new_tokens: int = 0, *, answer: str = ""
    ) -> EncodedPrompt:
        """Render and encode a question, as ``LlavaProcessor.apply_chat_template(tokenize=True)`` does.

        A template that writes the first special token itself does not get a second one.

        Args:
            prompt: The question.
            tokens_per_image: Visual tokens of each picture.
            max_new_tokens: Room that the context must have for the answer.
            answer: What stands behind the rendered question; a space is put between where neither has one.

        Raises:
            PromptError: As :meth:`render` and :meth:`encode`.
        """
        text = self.render(prompt, len(tokens_per_image))
        if answer and not text[-1:].isspace() and not answer[0].isspace():
            text += " "
        text += answer
        bos_token = self.format.special_tokens.get("bos_token")
        return self.encode(
            text,
            tokens_per_image,
            max_new_tokens=max_new_tokens,
            add_special_tokens=bos_token is None or not text.startswith(bos_token),
        )

    def _check(self, encoded: EncodedPrompt, num_visual: int, max_new_tokens: int) -> None:
        num_rows, found = len(encoded.token_ids), len(encoded.visual_rows)
        if found != num_visual:
            raise PromptError(
                f"{num_visual} visual tokens became {found} in the tokenizer: keep "
                f"{self.format.image_token!r} apart from other special tokens in the prompt"
            )
        if num_rows == 0:
            raise PromptError("the prompt is empty: write a question about the picture")
        if num_visual and encoded.num_text_rows_after_last_image == 0:
            raise PromptError("the prompt ends with a picture: put the question after the last picture")
        limit, of_whom, remedy = self.format.context_length, "the context of", ""
        if self.built_for is not None and self.built_for < limit:
            limit, of_whom = self.built_for, "what the engines were built for,"
            remedy = ", or build with a larger --max-sequence"
        excess = num_rows + max_new_tokens - limit
        if excess > 0:
            raise PromptError(
                f"the prompt's {num_rows} tokens ({num_visual} of them visual) and {max_new_tokens} new ones "
                f"exceed {of_whom} {limit} by {excess}: shorten the text, give fewer pictures or lower "
                f"max_new_tokens{remedy}"
            )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}): export the bundle again") from error
    except Exception as error:  # tokenizers raises nothing more specific
        raise BundleError(f"{path} is not a tokenizer ({error}): export the bundle again") from error
    # A file may carry the settings of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(tokens: Mapping[str, str]) -> bool:
    return all(isinstance(text, str) for text in (*tokens, *tokens.values()))
