"""What a session gives back."""

from dataclasses import dataclass
from typing import Any

from edgeprune.visual_layout import VisualLayout


@dataclass(frozen=True)
class SiteReport:
    """What one pruning site did with one prompt.

    Attributes:
        name: "site0" …
        place: Where it lies, in words.
        tokens_in: Visual tokens that entered it.
        kept: Visual tokens that left it.
        indices: The slots of the kept tokens (:mod:`edgeprune.visual_layout`), ascending; where pictures are one tile
            each, picture · patches + row-major patch index. A merged token stands for its cluster's centre.
        evictions: Where tokens go on being dropped while the answer is generated: (generated tokens, visual tokens
            left) at every drop.
    """

    name: str
    place: str
    tokens_in: int
    kept: int
    indices: tuple[int, ...]
    evictions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer with everything that led to it.

    Attributes:
        text: The answer, without stop text and special tokens.
        token_ids: Generated tokens, without the end token.
        finish_reason: "end" (the model ended), "stop" (a stop text), or "length" (max_new_tokens).
        prompt_tokens: Rows of the prompt, visual tokens included.
        sites: What every pruning site did; empty for a prompt without pictures.
        timings_ms: Milliseconds by stage; "total" is "time_to_first_token" and "decode", which are sums, too.
        decode_steps: Steps after prefill; the end token takes one, too.
        visual: The visual tokens of the pictures, unpruned; None for a prompt without pictures.
        entering: The slots of those that entered the decoder, ascending.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    sites: tuple[SiteReport, ...]
    timings_ms: dict[str, float]
    decode_steps: int
    visual: VisualLayout | None = None
    entering: tuple[int, ...] = ()

    @property
    def decode_tokens_per_second(self) -> float:
        """Rate of the tokens after the first."""
        decode = self.timings_ms["decode"]
        return 1000 * self.decode_steps / decode if decode > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "decode_steps": self.decode_steps,
            "sites": [
                {
                    "name": site.name,
                    "place": site.place,
                    "tokens_in": site.tokens_in,
                    "kept": site.kept,
                    "indices": list(site.indices),
                    "evictions": [list(event) for event in site.evictions],
                }
                for site in self.sites
            ],
            "timings_ms": {name: round(value, 3) for name, value in self.timings_ms.items()},
        }
