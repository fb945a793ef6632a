"""What one sample shows: how long its sequence is at every depth, and what every site keeps of every picture."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.calib.samples import Sample
from edgeprune.errors import PictureError
from edgeprune.manifest import Manifest
from edgeprune.runtimes.answer import Answer
from edgeprune.runtimes.sampling import SamplingOptions
from edgeprune.runtimes.session import Session
from edgeprune.visual_layout import VisualLayout


@dataclass(frozen=True)
class Record:
    """What one sample showed.

    Attributes:
        sample_sha256: Hash of the sample, see :func:`sample_sha256`.
        sequence_lengths: Rows that entered each segment in prefill.
        kept: By site, visual tokens that left it, of each picture.
        text_length: Rows of the prompt that are no visual tokens.
        tiles: Tiles of the pictures.
        generated_length: Generated tokens, without the end token.
    """

    sample_sha256: str
    sequence_lengths: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    text_length: int
    tiles: int
    generated_length: int


def sample_sha256(sample: Sample) -> str:
    """Hash over the prompt and the contents of the pictures, wherever they lie.

    Raises:
        PictureError: A picture cannot be read.
    """
    digests = [hashlib.sha256(_read(path)).hexdigest() for path in sample.pictures]
    return hashlib.sha256(json.dumps([sample.prompt, digests]).encode()).hexdigest()


def record_sample(session: Session, sample: Sample, max_new_tokens: int) -> Record:
    """Answer a sample's question and note the lengths; the likeliest tokens are taken, so nothing is random.

    Raises:
        PictureError: A picture is unusable.
        PromptError: The prompt is empty, too long, or its placeholders do not fit the pictures.
    """
    hashed = sample_sha256(sample)
    answer = session.answer(sample.pictures, sample.prompt, SamplingOptions(max_new_tokens=max_new_tokens))
    return record_of(answer, session.bundle.manifest, hashed)


def record_of(answer: Answer, manifest: Manifest, hashed: str) -> Record:
    """The record of an answer about pictures."""
    visual = answer.visual
    if visual is None:
        raise PictureError("the sample has no picture: give its path as 'image'")
    text = answer.prompt_tokens - len(answer.entering)
    return Record(
        sample_sha256=hashed,
        sequence_lengths=(answer.prompt_tokens, *(text + site.kept for site in answer.sites)),
        kept=tuple(visual.count_by_image(np.array(site.indices, np.int64)) for site in answer.sites),
        text_length=text,
        tiles=_tiles(visual, manifest),
        generated_length=len(answer.token_ids),
    )


def _tiles(visual: VisualLayout, manifest: Manifest) -> int:
    """Tiles that the tower saw; where pictures keep their size, each is one."""
    if any("patches" in tensor.shape for tensor in manifest.graphs["vision"].inputs):
        return visual.num_images
    return int(visual.places.shape[0] - visual.inserted) // manifest.geometry.num_patches


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(f"{path} does not exist: check the path") from error
    except OSError as error:
        raise PictureError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
