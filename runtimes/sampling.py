"""From logits to the next token, and when to stop."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BackendError, PromptError


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_new_tokens: Upper limit of generated tokens.
        temperature: 0 takes the most likely token; otherwise the logits are divided by it and drawn from.
        top_k: Draw from the k most likely tokens; 0 for all.
        top_p: Draw from the smallest set of tokens that holds this probability; 1 for all.
        seed: Of the draws; None draws differently each time.
        stop: Texts that end the generation and are not part of the answer.
        ignore_eos: Go on behind the model's end token, so that answers of the same length can be timed.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be an integer of at least 1, not {self.max_new_tokens!r}")
        if not _is_finite(self.temperature) or self.temperature < 0:
            raise PromptError(
                f"temperature must be 0 (greedy) or a positive number, not {self.temperature!r}"
            )
        if not _is_int(self.top_k) or self.top_k < 0:
            raise PromptError(f"top_k must be 0 (all tokens) or a positive integer, not {self.top_k!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise PromptError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.seed is not None and (not _is_int(self.seed) or self.seed < 0):
            raise PromptError(f"seed must be None or an integer of at least 0, not {self.seed!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise PromptError(f"stop must be a tuple of non-empty texts, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))


class TokenSampler:
    """Chooses one token per call; with a seed, the same calls choose the same tokens."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        # PCG64 by name: numpy may change what default_rng means.
        self._generator = np.random.Generator(np.random.PCG64(options.seed))

    def __call__(self, logits: NDArray[Any]) -> int:
        """The next token's id.

        Args:
            logits: [V] float.

        Raises:
            BackendError: The logits hold NaN or +inf, or nothing but −inf.
        """
        _check(logits)
        if self._options.temperature == 0:
            return int(np.argmax(logits))
        cumulative = np.cumsum(self._probabilities(logits))
        token_id = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        # Rounding may put the draw on the sum itself: then it belongs to the last token that can be drawn.
        return int(min(token_id, np.searchsorted(cumulative, cumulative[-1], side="left")))

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """What a call draws from [V]: temperature, then top-k, then top-p, as transformers filters.

        At temperature 0 the chosen token has probability 1.

        Raises:
            BackendError: As a call does.
        """
        _check(logits)
        if self._options.temperature == 0:
            greedy = np.zeros(logits.shape[0], np.float64)
            greedy[np.argmax(logits)] = 1
            return greedy
        return self._probabilities(logits)

    def _probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        options = self._options
        scores = logits.astype(np.float64) / options.temperature
        if 0 < options.top_k < scores.size:
            # Tokens that tie with the k-th stay, as in TopKLogitsWarper.
            scores = np.where(scores < np.partition(scores, -options.top_k)[-options.top_k], -np.inf, scores)
        if options.top_p < 1:
            # Ascending, and of equal scores the higher id first, so that ties are kept from the lowest id on.
            order = scores.size - 1 - np.argsort(scores[::-1], kind="stable")
            unlikely = np.cumsum(_softmax(scores[order])) <= 1 - options.top_p
            unlikely[-1] = False
            scores[order[unlikely]] = -np.inf
        return _softmax(scores)


class StopMatcher:
    """Cuts a stream of text at the first of several stop texts.

    Text that may be the beginning of a stop text is withheld until it is decided, so that nothing is emitted
    that must be taken back.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._withheld = ""
        self._finished = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Add a piece of text.

        Returns:
            The text that is safe to emit, and whether a stop text was met; everything after it is ignored.
        """
        if self._finished:
            return "", True
        text = self._withheld + piece
        # The one that is complete first counts, so that the answer does not depend on where the pieces break.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._finished, self._withheld = True, ""
            return text[: min(found)[1]], True
        withheld = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - withheld :]
        return text[: len(text) - withheld], False

    def finish(self) -> str:
        """The text still withheld when generation ends without a stop text."""
        text, self._withheld, self._finished = self._withheld, "", True
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()  # type: ignore[no-any-return]


def _check(logits: NDArray[Any]) -> None:
    if logits.ndim != 1 or logits.size == 0:
        raise BackendError(
            f"logits of shape {list(logits.shape)} are not those of one token: pass the last row [V]"
        )
    highest = logits.max()
    if not math.isfinite(highest):
        raise BackendError(
            f"the model's largest logit is {highest}, most likely an overflow of float16: "
            "run the bundle in float32 or bfloat16, and check the export with 'edgeprune verify'"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
