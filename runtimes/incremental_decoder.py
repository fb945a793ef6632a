"""From token ids to text while they are generated."""

import re

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Turns token ids into text as they come.

    The pieces together are what the tokenizer makes of all ids, without the special ones. A piece is withheld
    while it may still change: inside a character, and inside a run of byte tokens, which SentencePiece
    tokenizers decode as a whole. Each step decodes the last piece and what is withheld, not the whole answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._skipped = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._context: list[int] = []  # ids of the last piece: what follows a piece decides about its spaces
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is certain by now, often the token's own, sometimes none."""
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            return ""
        self._pending.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._pending_text()
        if text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The text still withheld at the end of the answer."""
        return self._emit(self._pending_text()) if self._pending else ""

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=True)
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=True)[len(before) :]

    def _emit(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text
