"""A bundle is calibrated whole or not at all, and what is interrupted goes on where it was."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from noise_data import write_data

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.calib.calibration import CalibrationOptions, calibrate
from edgeprune.calib.runner import Engine, LocalRunner, Outcome
from edgeprune.calib.samples import BadSample, Sample
from edgeprune.calibration_entry import CalibrationEntry
from edgeprune.errors import BundleError, DataError
from edgeprune.manifest import MANIFEST_FILE, EngineSetEntry, manifest_to_json

COUNT = 10
OPTIONS = CalibrationOptions(max_new_tokens=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten questions."""
    return write_data(tmp_path_factory.mktemp("data"), COUNT)


@pytest.fixture
def bundle(atp_bundle, tmp_path) -> Path:
    """A copy of the bundle with three sites."""
    return Path(shutil.copytree(atp_bundle, tmp_path / "atp"))


@pytest.fixture(scope="module")
def undisturbed(atp_bundle, data, tmp_path_factory) -> CalibrationEntry:
    """What a calibration gives that nothing happens to."""
    bundle = Path(shutil.copytree(atp_bundle, tmp_path_factory.mktemp("undisturbed") / "atp"))
    return calibrate(bundle, data, OPTIONS)


@dataclass
class Stopped:
    """A runner that is interrupted before a sample, and remembers what it ran.

    Attributes:
        before: The place of the sample, from 0; None interrupts nothing.
        ran: Numbers of the samples that were run.
    """

    before: int | None = None
    ran: list[int] = field(default_factory=list)
    engine: Engine = field(default_factory=Engine)

    def run(self, bundle: Path, samples: Sequence[Sample], max_new_tokens: int) -> Iterator[Outcome]:
        for index, found in enumerate(LocalRunner(self.engine).run(bundle, samples, max_new_tokens)):
            if index == self.before:
                raise KeyboardInterrupt
            self.ran.append(found[0].number)
            yield found


@dataclass
class Seen:
    """Remembers what it is told."""

    steps: list[tuple[int, int, int]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def samples(self, done: int, total: int, skipped: int) -> None:
        self.steps.append((done, total, skipped))

    def bad(self, sample: BadSample) -> None:
        self.skipped.append(f"{sample.name}: {sample.reason}")


def test_statistics_are_those_of_the_answers(undisturbed, atp_bundle, data):
    with edgeprune.open_session(atp_bundle) as session:
        samples = [json.loads(line) for line in data.read_text().splitlines()]
        options = edgeprune.SamplingOptions(max_new_tokens=2)
        answers = [session.answer([data.parent / s["image"]], s["prompt"], options) for s in samples]
    assert (undisturbed.samples, undisturbed.skipped) == (COUNT, 0)
    for index, name in enumerate(("site0", "site1", "site2")):
        kept = [answer.sites[index].kept for answer in answers]
        found = undisturbed.keep_per_image[name]
        values, counts = np.unique(kept, return_counts=True)
        assert (found.values, found.counts, found.mean) == (tuple(values), tuple(counts), np.mean(kept))
        entering = [a.prompt_tokens - 36 + count for a, count in zip(answers, kept, strict=True)]
        rows = undisturbed.sequence_lengths[f"segment{index + 1}"]
        assert rows.values == tuple(np.unique(entering))
        assert set(found.quantiles) == {"0.1", "0.5", "0.9"}
    assert undisturbed.sequence_lengths["segment0"].max == max(a.prompt_tokens for a in answers)
    assert undisturbed.text_lengths.max == max(a.prompt_tokens for a in answers) - 36
    assert undisturbed.generated_lengths.max == max(len(a.token_ids) for a in answers)
    # Pictures and questions differ; a constant would show nothing.
    assert len(undisturbed.keep_per_image["site0"].values) > 1


def test_buckets_cover_the_models_context(undisturbed, atp_bundle):
    context = Bundle.open(atp_bundle).manifest.geometry.context_length
    assert set(undisturbed.prefill) == {f"segment{index}" for index in range(4)}
    for name, segment in undisturbed.prefill.items():
        assert (segment.buckets[0].least, segment.buckets[-1].greatest) == (1, context)
        assert sum(bucket.prompts for bucket in segment.buckets) == COUNT
        assert len(segment.buckets) == min(2, len(undisturbed.sequence_lengths[name].values))
    assert (undisturbed.max_sequence, undisturbed.fallback) == (context, None)


def test_it_is_in_the_manifest_and_nothing_else_changes(bundle, data, undisturbed):
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    manifest = Bundle.open(bundle).manifest
    assert calibrate(bundle, data, OPTIONS) == undisturbed
    after = {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert before.pop(MANIFEST_FILE) != after.pop(MANIFEST_FILE)
    assert before == after
    assert Bundle.open(bundle).manifest == replace(manifest, calibration=undisturbed)
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("before", [0, 7])
def test_what_is_interrupted_goes_on_where_it_was(bundle, data, undisturbed, before):
    manifest = (bundle / MANIFEST_FILE).read_text()
    first, second = Stopped(before), Stopped()
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, data, OPTIONS, runner=first)
    assert (bundle / MANIFEST_FILE).read_text() == manifest
    seen = Seen()
    assert calibrate(bundle, data, OPTIONS, runner=second, progress=seen) == undisturbed
    assert (len(first.ran), len(second.ran)) == (before, COUNT - before)
    assert sorted(first.ran + second.ran) == list(range(1, COUNT + 1))
    assert (seen.steps[0], seen.steps[-1]) == ((before, COUNT, 0), (COUNT, COUNT, 0))
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_restart_begins_anew(bundle, data, undisturbed):
    again = Stopped()
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, data, OPTIONS, runner=Stopped(6))
    assert calibrate(bundle, data, OPTIONS, runner=again, restart=True) == undisturbed
    assert len(again.ran) == COUNT


def test_a_picture_that_changed_meanwhile_is_run_again(bundle, tmp_path):
    data = write_data(tmp_path / "own", 6)
    again = Stopped()
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, data, OPTIONS, runner=Stopped(4))
    shutil.copy(tmp_path / "own" / "005.png", tmp_path / "own" / "001.png")
    calibrate(bundle, data, OPTIONS, runner=again)
    assert again.ran == [2, 5, 6]


def test_more_samples_take_up_what_fewer_left(bundle, data):
    few, more = replace(OPTIONS, samples=5), Stopped()
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, data, few, runner=Stopped(3))
    found = calibrate(bundle, data, replace(few, samples=8), runner=more)
    assert (found.samples, len(more.ran)) == (8, 5)


def test_bad_samples_are_named_counted_and_passed_over(bundle, tmp_path):
    data = write_data(tmp_path / "own", 6)
    lines = data.read_text().splitlines()
    lines[1] = '{"image": '
    lines[3] = '{"audio": "a.wav", "prompt": "Who?"}'
    lines[4] = '{"image": "none.png", "prompt": "What?"}'
    lines.append(json.dumps({"image": "000.png", "prompt": "What " * 600}))
    data.write_text("\n".join(lines))
    seen = Seen()
    found = calibrate(bundle, data, OPTIONS, progress=seen)
    assert (found.samples, found.skipped) == (3, 4)
    assert [name.partition(":")[0] for name in seen.skipped] == ["line 2", "line 4", "line 5", "line 7"]
    assert "none.png does not exist" in seen.skipped[2]
    assert "exceed the context" in seen.skipped[3]
    assert seen.steps[-1] == (5, 5, 4)


def test_nothing_usable_leaves_the_bundle_alone(bundle, tmp_path):
    before = (bundle / MANIFEST_FILE).read_text()
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "none.png", "prompt": "What?"}\n' * 2)
    with pytest.raises(DataError, match=r"none of 2 samples can be used; line 1: .*none\.png does not exist"):
        calibrate(bundle, data, OPTIONS)
    assert (bundle / MANIFEST_FILE).read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_too_few_samples_for_a_quantile_is_said_before_anything_runs(bundle, data):
    never = Stopped()
    with pytest.raises(DataError, match=r"the 0\.99 quantile needs at least 100 samples, there are 10"):
        calibrate(bundle, data, replace(OPTIONS, quantiles=(0.5, 0.99)), runner=never)
    assert never.ran == []


def test_profiles_can_be_chosen_anew_without_data(bundle, data, undisturbed):
    with pytest.raises(DataError, match="not calibrated yet"):
        calibrate(bundle, None)
    calibrate(bundle, data, OPTIONS)
    three = calibrate(bundle, None, replace(OPTIONS, profiles=3))
    assert {segment.allowed for segment in three.prefill.values()} == {3}
    assert replace(three, prefill=undisturbed.prefill) == undisturbed
    assert calibrate(bundle, None, OPTIONS) == undisturbed


def test_a_cap_has_a_fallback_and_leaves_longer_prompts_out(bundle, data, undisturbed):
    longest = undisturbed.sequence_lengths["segment0"]
    found = calibrate(bundle, data, replace(OPTIONS, max_sequence=longest.max - 1))
    assert (found.max_sequence, found.fallback) == (longest.max - 1, "onnx graphs")
    covered = found.prefill["segment0"].buckets
    assert sum(bucket.prompts for bucket in covered) == COUNT - longest.counts[-1]
    assert covered[-1].greatest == longest.max - 1
    with pytest.raises(DataError, match="all prompts are longer than --max-sequence 4"):
        calibrate(bundle, None, replace(OPTIONS, max_sequence=4))
    with pytest.raises(DataError, match="--max-sequence is 513: give 2 to 512"):
        calibrate(bundle, None, replace(OPTIONS, max_sequence=513))


def test_a_measured_table_takes_the_place_of_the_cost_model(bundle, data, tmp_path):
    table = tmp_path / "latency.json"
    options = replace(OPTIONS, profiles=1)
    by_flops = calibrate(bundle, data, options)
    longest = by_flops.sequence_lengths["segment0"].max
    assert by_flops.prefill["segment0"].buckets[0].tuned < longest
    # The longest prompts take nearly all of the time, so a single profile is tuned for them.
    times = {str(rows): 1e6 if rows >= longest else 1e-6 for rows in range(1, longest + 1)}
    table.write_text(json.dumps({f"segment{index}": times for index in range(4)}))
    by_table = calibrate(bundle, None, replace(options, latency=table))
    assert (by_flops.cost, by_table.cost) == ("flops", "latency table")
    assert by_table.prefill["segment0"].buckets[0].tuned == longest


def test_engines_that_were_built_meanwhile_stay(bundle, data):
    engines = {"orin": EngineSetEntry("4" * 64, "tensorrt", "10.3.0", 87, "fp16", None, "one", {}, {})}

    class Builder(Stopped):
        def run(self, bundle, samples, max_new_tokens):
            manifest = replace(Bundle.open(bundle).manifest, engines=engines)
            (bundle / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")
            yield from super().run(bundle, samples, max_new_tokens)

    calibrate(bundle, data, OPTIONS, runner=Builder())
    assert Bundle.open(bundle).manifest.engines == engines


def test_a_bundle_that_was_exported_meanwhile_keeps_its_manifest(bundle, data):
    class Exporter(Stopped):
        def run(self, bundle, samples, max_new_tokens):
            manifest = Bundle.open(bundle).manifest
            other = replace(manifest, source=replace(manifest.source, sha256="1" * 64))
            (bundle / MANIFEST_FILE).write_text(manifest_to_json(other), encoding="utf-8")
            yield from super().run(bundle, samples, max_new_tokens)

    with pytest.raises(BundleError, match="exported again meanwhile"):
        calibrate(bundle, data, OPTIONS, runner=Exporter())
    assert Bundle.open(bundle).manifest.calibration is None


@pytest.mark.parametrize(
    ("bundle_name", "segments"),
    [("unpruned_bundle", {"segment0"}), ("cdpruner_bundle", {"segment1", "segment2"}), ("ivtp_bundle", None)],
)
def test_bundles_without_sites_or_without_attention_in_a_segment(
    bundle_name, segments, data, tmp_path, request
):
    bundle = Path(shutil.copytree(request.getfixturevalue(bundle_name), tmp_path / "copy"))
    manifest = Bundle.open(bundle).manifest
    found = calibrate(bundle, data, replace(OPTIONS, samples=3))
    expected = {segment.graph for segment in manifest.segments if segment.layers}
    assert set(found.prefill) == expected
    assert segments is None or expected == segments
    assert set(found.keep_per_image) == {site.graph for site in manifest.sites}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples is 0"),
        ({"profiles": 0}, "--profiles is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"quantiles": (0.5, 1.0)}, "the quantile 1 is no share"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(DataError, match=message):
        CalibrationOptions(**options)
