"""Whole profiles: what they say, what they refuse, and that they survive being written."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_checkpoints import edit_json

from edgeprune.cli import main
from edgeprune.errors import BundleError, ProfileError, TargetError
from edgeprune.manifest import MANIFEST_FILE
from edgeprune.roofline import target_rates
from edgeprune.runtimes.profiling.memory import MemoryRequest, measure_memory
from edgeprune.runtimes.profiling.profiler import ProfileOptions, profile
from edgeprune.runtimes.profiling.report import ProfileReport
from edgeprune.runtimes.profiling.samples import drawn_samples
from edgeprune.stage_cost import prompt_costs
from edgeprune.targets import find_target

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")

QUICK = ProfileOptions(runs=1, warmup=0, max_new_tokens=1, threads=1)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_report_survives_json(profiled):
    text = json.dumps(profiled.report.to_json())
    assert ProfileReport.from_json(json.loads(text)) == profiled.report


@pytest.mark.parametrize("change", [{"format_version": 2}, {"bundles": []}, {"peak": 3}, {"surprise": 1}])
def test_json_that_is_no_report(profiled, change):
    with pytest.raises(ProfileError, match="profile again"):
        ProfileReport.from_json(profiled.report.to_json() | change)


def test_what_was_asked_and_where(profiled):
    settings = profiled.report.settings
    assert (settings.runs, settings.warmup, settings.max_new_tokens, settings.threads) == (3, 1, 3, 1)
    assert (settings.samples, len(settings.prompts), settings.left_out) == ("given", 2, 3)
    assert profiled.report.machine.device == settings.backend == "onnxruntime-cpu"
    assert any("fewer than 20 runs" in note for note in profiled.report.notes)


def test_kept_tokens_are_drawn_for_every_picture(profiled):
    assert [title for title, _ in profiled.overlays] == [
        "<b>first</b> & only: What colour is the circle?",
        "second: What colour is the circle?",
    ]


def test_a_prediction_is_the_roofline_at_the_counts_of_the_runs(profiled, atp_bundle):
    from edgeprune.bundle import Bundle

    manifest = Bundle.open(atp_bundle).manifest
    orin, desktop = profiled.report.predictions
    assert (orin.target, orin.precision, desktop.target) == ("agx-orin-64", "int8", "rtx40")
    rates = target_rates(find_target("agx-orin-64"), "int8")
    costs = [prompt_costs(manifest, run.counts) for run in profiled.runs[0]]
    for stage in orin.bundles[0].stages:
        mean = sum(rates.seconds(cost[stage.name]) for cost in costs) / len(costs)
        assert stage.milliseconds == pytest.approx(1000 * mean)
    assert orin.bundles[0].first_token_ms == pytest.approx(
        sum(stage.milliseconds for stage in orin.bundles[0].stages)
    )
    kept = [run.counts.kept[0] + run.counts.text for run in profiled.runs[0]]
    (second,) = [stage for stage in orin.bundles[0].stages if stage.name == "prefill.segment1"]
    assert second.tokens == pytest.approx(sum(kept) / len(kept))


def test_memory_is_that_of_a_process_of_its_own(profiled, atp_bundle, samples):
    for bundle in profiled.report.bundles:
        assert bundle.memory.host_peak > bundle.memory.weights
        assert bundle.memory.device_peak is None
    nowhere = MemoryRequest(atp_bundle / "nowhere", "onnxruntime", "cpu", 1, 1)
    assert measure_memory(nowhere, samples.samples[0])[0] is None


def test_a_bundle_against_itself_saves_nothing(random_bundle):
    found = profile(random_bundle, drawn_samples(), against=[random_bundle], options=QUICK).report
    assert [bundle.name for bundle in found.bundles] == ["random", "random (2)"]
    assert {entry.flops_ratio for entry in found.comparisons} == {1.0}
    assert {entry.saving_efficiency for entry in found.comparisons} == {None}
    assert any("drawn" in note for note in found.notes)
    assert any("unpruned" in note for note in found.notes)


def test_another_checkpoint_of_the_same_sizes_is_mentioned(random_bundle, tmp_path):
    twin = Path(shutil.copytree(random_bundle, tmp_path / "twin"))
    source = json.loads((twin / MANIFEST_FILE).read_text())["source"]
    edit_json(twin / MANIFEST_FILE, source=source | {"sha256": "0" * 64})
    found = profile(random_bundle, drawn_samples(), against=[twin], options=QUICK).report
    assert any("twin was exported from other files" in note for note in found.notes)


def test_another_model_is_refused(random_bundle, unpruned_bundle):
    with pytest.raises(ProfileError, match=r"another model than .*num_layers.* differ.*one checkpoint"):
        profile(random_bundle, drawn_samples(), against=[unpruned_bundle], options=QUICK)


def test_what_is_refused_before_anything_is_measured(random_bundle, tmp_path):
    for changes, expected in (
        ({"runs": 0}, "--runs is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"precision": "int8"}, "--target"),
    ):
        with pytest.raises(ProfileError, match=expected):
            dataclasses.replace(QUICK, **changes)
    with pytest.raises(TargetError, match="'toaster' is unknown"):
        profile(random_bundle, drawn_samples(), options=dataclasses.replace(QUICK, targets=("toaster",)))
    with pytest.raises(BundleError, match="is not a folder"):
        profile(tmp_path / "nothing", drawn_samples(), options=QUICK)


def test_the_command_prints_json_and_writes_its_files(random_bundle, tmp_path):
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    page.write_text("older")
    files = ("--html", page, "--trace", trace)
    result = invoke("profile", random_bundle, "--runs", 1, "--warmup", 0, "--threads", 1, *files, "--json")
    assert result.exit_code == 0, result.output
    report = ProfileReport.from_json(json.loads(result.stdout))
    assert report.bundles[0].name == "random"
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(trace.read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "trace.json"]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(random_bundle, tmp_path):
    for path, expected in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "is no folder")):
        result = invoke("profile", random_bundle, "--html", path)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert expected in line


def test_how_far_pruning_pays_is_one_line_of_inspect(random_bundle):
    result = invoke("inspect", random_bundle, "--target", "agx-orin-64")
    assert result.stdout.splitlines()[-1].startswith("Knee on Jetson AGX Orin 64 GB (fp16, data sheet): 208 ")
    data = json.loads(invoke("inspect", random_bundle, "--target", "agx-orin-64", "--json").stdout)
    assert data["knee"]["segments"][0]["reads_weights_only"] is True
