"""What a profile asks about: the user's pictures and questions, or drawn ones where there are none."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeprune.calib.samples import BadSample, Sample, choose_samples, read_samples
from edgeprune.errors import ProfileError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.preprocessing import PictureSource, read_picture

DRAWN, GIVEN = "drawn", "given"
DEFAULT_PROMPT = "Describe the picture."
_DRAWN_PICTURES = 4


@dataclass(frozen=True)
class ProfileSample:
    """One prompt.

    Attributes:
        name: For reports.
        pictures: In the order of the prompt.
        prompt: The question.
    """

    name: str
    pictures: tuple[PictureSource, ...]
    prompt: str


@dataclass(frozen=True)
class SampleSet:
    """The prompts of a profile; a bundle knows nothing of pictures, so somebody has to bring them.

    Attributes:
        kind: "given" by the user, or "drawn" by :func:`edgeprune.export.check_pictures.check_pictures`.
        samples: At least one.
        left_out: Prompts of the data that were not drawn.
        unusable: Lines of the data that are no prompts.
    """

    kind: str
    samples: tuple[ProfileSample, ...]
    left_out: int = 0
    unusable: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (DRAWN, GIVEN):
            raise ValueError(f"samples are '{DRAWN}' or '{GIVEN}', not {self.kind!r}")
        if not self.samples:
            raise ProfileError("there is nothing to ask about: give at least one picture")


def drawn_samples() -> SampleSet:
    """Pictures of noise and shapes; how many of their tokens a method keeps says nothing about photographs."""
    pictures = check_pictures(_DRAWN_PICTURES)
    return SampleSet(
        DRAWN,
        tuple(
            ProfileSample(f"drawn picture {index + 1}", (picture,), DEFAULT_PROMPT)
            for index, picture in enumerate(pictures)
        ),
    )


def one_sample(images: Sequence[PictureSource], prompt: str | None) -> SampleSet:
    """One question about one or more pictures; drawn pictures where there are none.

    Raises:
        ProfileError: There is a question and no picture.
    """
    if images:
        return SampleSet(GIVEN, (ProfileSample("picture", tuple(images), prompt or DEFAULT_PROMPT),))
    if prompt is not None:
        raise ProfileError(
            "--prompt asks about pictures and there are none: add --image, or leave --prompt away to profile drawn ones"
        )
    return drawn_samples()


def samples_from_data(data: str | Path, prompt: str | None, count: int) -> SampleSet:
    """At most ``count`` prompts of a folder of pictures or a JSONL file (:mod:`edgeprune.calib.samples`).

    Raises:
        DataError: There is no such data, or nothing in it can be used.
        PictureError: A picture cannot be read.
    """
    if prompt is None and Path(data).is_dir():
        prompt = DEFAULT_PROMPT
    usable = _Counted(read_samples(data, prompt))
    chosen, bad = choose_samples(usable, count)
    for sample in chosen:
        for picture in sample.pictures:
            # Before anything is measured.
            read_picture(picture)
    samples = tuple(ProfileSample(sample.name, sample.pictures, sample.prompt) for sample in chosen)
    return SampleSet(GIVEN, samples, usable.count - len(bad) - len(samples), len(bad))


def choose(
    data: str | Path | None, images: Sequence[PictureSource], prompt: str | None, count: int
) -> SampleSet:
    """The prompts of what a user gave: data, or one question, or nothing.

    Raises:
        ProfileError: Both data and pictures, or a question without a picture.
        DataError: There is no such data, or nothing in it can be used.
        PictureError: A picture cannot be read.
    """
    if data is not None and images:
        raise ProfileError("--data and --image both say what to ask about: choose one")
    return one_sample(images, prompt) if data is None else samples_from_data(data, prompt, count)


class _Counted:
    """Samples that are counted while they pass."""

    def __init__(self, samples: Iterable[Sample | BadSample]) -> None:
        self._samples = samples
        self.count = 0

    def __iter__(self) -> Iterator[Sample | BadSample]:
        for sample in self._samples:
            self.count += 1
            yield sample
