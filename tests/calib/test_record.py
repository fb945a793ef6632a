"""A record says of a sample what the session's answer says, picture by picture."""

from dataclasses import replace

import numpy as np
import pytest
from noise_data import write_data

import edgeprune
from edgeprune.calib.record import record_sample, sample_sha256
from edgeprune.calib.samples import Sample, read_samples
from edgeprune.errors import PictureError

# 36 visual tokens a picture, row by row.
TOKENS = 36


@pytest.fixture
def samples(tmp_path) -> list[Sample]:
    """Five of one picture."""
    return list(read_samples(write_data(tmp_path, 5)))


def test_lengths_at_every_depth(atp_bundle, samples):
    """Three sites whose counts depend on the picture."""
    with edgeprune.open_session(atp_bundle) as session:
        for sample in samples:
            answer = session.answer(
                sample.pictures, sample.prompt, edgeprune.SamplingOptions(max_new_tokens=3)
            )
            record = record_sample(session, sample, 3)
            text = answer.prompt_tokens - TOKENS
            assert record.text_length == text
            assert record.kept == tuple((len(site.indices),) for site in answer.sites)
            kept = [site.kept for site in answer.sites]
            assert record.sequence_lengths == (TOKENS + text, *(text + count for count in kept))
            assert record.generated_length == len(answer.token_ids)
            assert record.tiles == 1
            assert record.sample_sha256 == sample_sha256(sample)


def test_every_picture_is_counted(atp_bundle, samples):
    both = replace(samples[0], pictures=(*samples[1].pictures, *samples[2].pictures))
    with edgeprune.open_session(atp_bundle) as session:
        record = record_sample(session, both, 1)
        answer = session.answer(both.pictures, both.prompt, edgeprune.SamplingOptions(max_new_tokens=1))
    assert record.tiles == 2
    for counts, site in zip(record.kept, answer.sites, strict=True):
        indices = np.array(site.indices)
        assert counts == (int((indices < TOKENS).sum()), int((indices >= TOKENS).sum()))


@pytest.mark.parametrize(
    ("bundle", "expected"),
    [("unpruned_bundle", ()), ("combined_bundle", ((18,), (10,), (3,))), ("sparsevlm_bundle", None)],
)
def test_fixed_counts(bundle, expected, samples, request):
    with edgeprune.open_session(request.getfixturevalue(bundle)) as session:
        record = record_sample(session, samples[0], 1)
        # Merged tokens are among those that a site leaves.
        wanted = (
            tuple((site.keep_per_image,) for site in session.bundle.manifest.sites)
            if expected is None
            else expected
        )
    assert record.kept == wanted
    assert record.sequence_lengths[1:] == tuple(record.text_length + count for (count,) in wanted)


def test_the_hash_follows_the_content(samples, tmp_path):
    first, second = samples[:2]
    moved = tmp_path / "moved.png"
    moved.write_bytes(first.pictures[0].read_bytes())
    assert sample_sha256(replace(first, pictures=(moved,), number=9, answer="x")) == sample_sha256(first)
    assert sample_sha256(replace(first, prompt="Other?")) != sample_sha256(first)
    assert sample_sha256(replace(first, pictures=second.pictures)) != sample_sha256(first)


def test_a_picture_that_is_not_there(samples, tmp_path):
    with pytest.raises(PictureError, match="does not exist"):
        sample_sha256(replace(samples[0], pictures=(tmp_path / "none.png",)))
    with pytest.raises(PictureError, match="cannot be read"):
        sample_sha256(replace(samples[0], pictures=(tmp_path,)))
