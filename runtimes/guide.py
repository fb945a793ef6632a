"""The instruction as CLIP's text tower reads it, aligned with the decoder's tokens (IVTP, Eq. 7)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgeprune.errors import BundleError

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"


@dataclass(frozen=True)
class GuideInputs:
    """The instruction in CLIP's tokens.

    Shapes:
        input_ids: [Q, 77] int64, chunks of one text, each with its start and end token, padded with end tokens.
        token_map: [T, Q·77] float32; row t holds 1/n at the n CLIP tokens whose characters overlap text token t, and
            zeros if there are none.
    """

    input_ids: NDArray[np.int64]
    token_map: NDArray[np.float32]


class GuideEncoder:
    """Tokenizes instructions with CLIP's tokenizer and aligns them by character offsets."""

    def __init__(self, tokenizer_json: Path, context_length: int) -> None:
        """Load the tokenizer.

        Args:
            tokenizer_json: CLIP's ``tokenizer.json``.
            context_length: Longest text in tokens, start and end token included (77).

        Raises:
            BundleError: The file is no CLIP tokenizer.
        """
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:
            raise BundleError(f"{tokenizer_json} is not a tokenizer ({error}): copy it again") from error
        # A file may carry the settings of its training.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        start, end = self.tokenizer.token_to_id(START_TOKEN), self.tokenizer.token_to_id(END_TOKEN)
        if start is None or end is None:
            raise BundleError(
                f"{tokenizer_json} has no {START_TOKEN} and {END_TOKEN}: it is not CLIP's tokenizer"
            )
        self.start, self.end = int(start), int(end)
        self.context_length = context_length

    def encode(self, text: str, offsets: NDArray[np.int64]) -> GuideInputs:
        """Encode the text after the last picture.

        Shapes:
            offsets: [T, 2] first and last-plus-one character of every text token.

        Texts longer than CLIP's context are cut into chunks that the tower reads one by one.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        room = self.context_length - 2
        num_chunks = max(1, -(-len(encoding.ids) // room))
        input_ids = np.full((num_chunks, self.context_length), self.end, dtype=np.int64)
        input_ids[:, 0] = self.start
        spans = np.zeros((num_chunks, self.context_length, 2), dtype=np.int64)
        for index, (token, span) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            chunk, place = divmod(index, room)
            input_ids[chunk, place + 1] = token
            spans[chunk, place + 1] = span
        begin, end = spans.reshape(-1, 2).T
        overlap = np.minimum(end, offsets[:, 1:]) > np.maximum(begin, offsets[:, :1])
        count = overlap.sum(axis=1, keepdims=True)
        return GuideInputs(input_ids, (overlap / np.maximum(count, 1)).astype(np.float32))
