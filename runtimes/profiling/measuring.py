"""Bundles that answer in turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeprune.manifest import Manifest
from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.profiling.recorder import DECODE, FIRST_TOKEN, Recorder, Span
from edgeprune.runtimes.profiling.samples import ProfileSample
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session
from edgeprune.stage_cost import PromptCounts

# Where every picture keeps its size (edgeprune.runtimes.flat_patches), a tile is a picture.
_ANY_SIZE = "patches"


@dataclass(frozen=True)
class Run:
    """One answer of one bundle.

    Attributes:
        round: The turn; answers of one turn are compared with each other.
        sample: Index of the prompt.
        started: Of ``time.perf_counter``.
        answer: The answer.
        counts: The rows on its way.
        spans: Undisturbed: what a caller would have waited for.
        stages: The same with a wait for the device at the end of every stage, so that its time is the stage's own;
            measured in an answer of its own where graphs run asynchronously, otherwise the same spans.
    """

    round: int
    sample: int
    started: float
    answer: Answer
    counts: PromptCounts
    spans: tuple[Span, ...]
    stages: tuple[Span, ...]

    @property
    def first_token_ms(self) -> float:
        """From the question to the first token."""
        return _first_token(self.spans).milliseconds

    @property
    def total_ms(self) -> float:
        """From the question to the last token."""
        return self.first_token_ms + sum(self.decode_ms)

    @property
    def decode_ms(self) -> tuple[float, ...]:
        """Every decode step."""
        return tuple(span.milliseconds for span in self.spans if span.name == DECODE)

    def stage_ms(self) -> dict[str, float]:
        """Every stage up to the first token, nested ones too."""
        end = _first_token(self.stages).end_ms
        sums: dict[str, float] = {}
        for span in self.stages:
            if span.name != FIRST_TOKEN and span.start_ms < end:
                sums[span.name] = sums.get(span.name, 0.0) + span.milliseconds
        return sums

    def nested_stages(self) -> frozenset[str]:
        """Those that lie inside another stage."""
        end = _first_token(self.stages).end_ms
        return frozenset(span.name for span in self.stages if span.depth > 1 and span.start_ms < end)

    def decode_stage_ms(self) -> dict[str, tuple[float, ...]]:
        """What lies inside of decode steps, every time that it happened."""
        end = _first_token(self.stages).end_ms
        found: dict[str, list[float]] = {}
        for span in self.stages:
            if span.depth == 1 and span.start_ms >= end:
                found.setdefault(span.name, []).append(span.milliseconds)
        return {name: tuple(values) for name, values in found.items()}


def _first_token(spans: Sequence[Span]) -> Span:
    return next(span for span in spans if span.name == FIRST_TOKEN)


def measure(
    sessions: Sequence[Session],
    samples: Sequence[ProfileSample],
    *,
    runs: int,
    warmup: int,
    max_new_tokens: int,
    at_round: Callable[[int], None] = lambda _: None,
) -> list[list[Run]]:
    """Let every session answer in every round, the order turned around from round to round.

    Answers go on behind the model's end token, so that all have the same steps.

    Args:
        sessions: One per bundle.
        samples: Round r asks sample r, beginning again after the last.
        runs: Rounds that count.
        warmup: Rounds before them.
        max_new_tokens: Tokens of every answer.
        at_round: Called before each round with its index.

    Returns:
        The runs of every session.
    """
    options = SamplingOptions(max_new_tokens=max_new_tokens, ignore_eos=True)
    found: list[list[Run]] = [[] for _ in sessions]
    for index in range(-warmup, runs):
        at_round(index + warmup)
        number = index % len(samples)
        order = list(range(len(sessions)))
        for which in order if index % 2 == 0 else reversed(order):
            run = _run(sessions[which], samples[number], options, max(index, 0), number)
            if index >= 0:
                found[which].append(run)
    return found


def _run(session: Session, sample: ProfileSample, options: SamplingOptions, index: int, number: int) -> Run:
    started = time.perf_counter()
    watch = Recorder()
    answer = session.answer(sample.pictures, sample.prompt, options, watch=watch)
    stages = watch
    if session.backend.asynchronous:
        stages = Recorder(session.backend.synchronize)
        session.answer(sample.pictures, sample.prompt, options, watch=stages)
    counts = prompt_counts(session.bundle.manifest, answer)
    return Run(index, number, started, answer, counts, watch.spans, stages.spans)


def prompt_counts(manifest: Manifest, answer: Answer) -> PromptCounts:
    """The rows of an answer's prompt."""
    entering = len(answer.entering)
    tiles: tuple[int, ...] = ()
    if answer.visual is not None:
        tiles = answer.visual.tokens_per_image
        if manifest.preprocessing.get("kind") != _ANY_SIZE:
            size = manifest.geometry.num_patches
            tiles = (size,) * ((answer.visual.places.shape[0] - answer.visual.inserted) // size)
    return PromptCounts(
        tiles=tiles,
        entering=entering,
        kept=tuple(site.kept for site in answer.sites),
        text=answer.prompt_tokens - entering,
    )
