"""A quantized bundle beside the one that it was made from: answers, kept tokens and times on the same samples."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgeprune.calib.samples import Sample
from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session

_PREFILL = ("prefill.", "select.", "gather.")


@dataclass
class Agreement:
    """What the samples showed so far.

    Attributes:
        equal: Whether the answers were the same.
        kept: By site: Jaccard index of the kept tokens.
        vision: Time of the quantized bundle's tower by that of the other.
        prefill: The same of prefill.
        decode: The same of a generated token.
    """

    equal: list[bool] = field(default_factory=list)
    kept: dict[str, list[float]] = field(default_factory=dict)
    vision: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, quantized: Answer, unquantized: Answer, *, prunes_tower: bool) -> None:
        """Compare two answers to one sample."""
        self.equal.append(quantized.token_ids == unquantized.token_ids)
        if prunes_tower:
            self.kept.setdefault("vision", []).append(jaccard(quantized.entering, unquantized.entering))
        for ours, theirs in zip(quantized.sites, unquantized.sites, strict=True):
            self.kept.setdefault(ours.name, []).append(jaccard(ours.indices, theirs.indices))
        for ratios, milliseconds in (
            (self.vision, _vision),
            (self.prefill, _prefill),
            (self.decode, _decode),
        ):
            before = milliseconds(unquantized)
            if before > 0 and milliseconds(quantized) > 0:
                ratios.append(milliseconds(quantized) / before)

    def kept_agreement(self) -> dict[str, float]:
        """By site, the mean over the samples."""
        return {site: statistics.fmean(values) for site, values in self.kept.items()}

    def answer_agreement(self) -> float:
        """Share of the samples with the same answer."""
        return statistics.fmean(self.equal)


def compare(
    quantized: Session,
    unquantized: Session,
    samples: Sequence[Sample],
    max_new_tokens: int,
    at_sample: Callable[[int], None],
) -> Agreement:
    """Let both answer every sample, in turns, so that a machine that slows down slows both.

    Args:
        quantized: The new bundle.
        unquantized: The one that it was made from.
        samples: Usable samples.
        max_new_tokens: Most tokens to generate.
        at_sample: Hears how many are done; may raise to end it.
    """
    options = SamplingOptions(max_new_tokens=max_new_tokens)
    prunes_tower = unquantized.bundle.manifest.geometry.tokens_per_tile is not None
    agreement = Agreement()
    # The first run of a session allocates; its times are of no use.
    for session in (quantized, unquantized):
        session.answer(samples[0].pictures, samples[0].prompt, options)
    for index, sample in enumerate(samples):
        at_sample(index)
        order = (quantized, unquantized) if index % 2 else (unquantized, quantized)
        answers = {id(session): session.answer(sample.pictures, sample.prompt, options) for session in order}
        agreement.add(answers[id(quantized)], answers[id(unquantized)], prunes_tower=prunes_tower)
    return agreement


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Size of the intersection by size of the union; 1 if both are empty."""
    union = set(one) | set(other)
    return len(set(one) & set(other)) / len(union) if union else 1.0


def _vision(answer: Answer) -> float:
    return answer.timings_ms.get("vision", 0.0) + answer.timings_ms.get("projector", 0.0)


def _prefill(answer: Answer) -> float:
    return sum(time for name, time in answer.timings_ms.items() if name.startswith(_PREFILL))


def _decode(answer: Answer) -> float:
    return answer.timings_ms["decode"] / answer.decode_steps if answer.decode_steps else 0.0
