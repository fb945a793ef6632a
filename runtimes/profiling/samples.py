"""What a profile asks about: the user's pictures and questions, or drawn ones where there are none."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.errors import ProfileError
from edgeprune.export.check_pictures import check_pictures
from edgeprune.runtimes.preprocessing import PictureSource

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
    """

    kind: str
    samples: tuple[ProfileSample, ...]

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
