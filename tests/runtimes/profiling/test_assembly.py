"""Numbers of a report against numbers taken by hand from the runs."""

import numpy as np
import pytest

from edgeprune.bundle import Bundle
from edgeprune.cost import DecoderShape, decoder_prefill_flops, kv_cache_bytes
from edgeprune.runtimes.profiling.assembly import prefill_ms, saving_efficiency

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")


@pytest.mark.parametrize(
    ("time_ratio", "flops_ratio", "expected"),
    # ATP-LLaVA on an A100: 432.7 → 266.4 ms at −78.1 % of the FLOPs; what EVS saved on an H200 cost time.
    [(266.4 / 432.7, 1 - 0.781, 0.492), (0.3098, 0.3098, 1.0), (1.1, 0.5, -0.2), (0.5, 1.0, None)],
)
def test_saving_efficiency(time_ratio, flops_ratio, expected):
    found = saving_efficiency(time_ratio, flops_ratio)
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-3))


def test_times_of_a_bundle(profiled):
    for bundle, runs in zip(profiled.report.bundles, profiled.runs, strict=True):
        first = [run.first_token_ms for run in runs]
        assert bundle.first_token_ms.p95 == pytest.approx(np.percentile(first, 95))
        steps = [ms for run in runs for ms in run.decode_ms]
        assert bundle.decode_ms.count == len(steps) == 6
        assert bundle.tokens_per_second == pytest.approx(1000 * 6 / sum(steps))
        assert [step.count for step in bundle.decode_steps] == [3, 3]
        assert bundle.prefill_ms.p50 == pytest.approx(np.median([prefill_ms(run) for run in runs]))


def test_the_stages_add_up_to_the_first_token(profiled):
    for bundle in profiled.report.bundles:
        stages = [stage for stage in bundle.stages if not stage.nested and stage.group != "decode"]
        assert sum(stage.milliseconds.mean for stage in stages) == pytest.approx(bundle.first_token_ms.mean)
        assert [stage.name for stage in stages][-1] == "host"


def test_flops_are_those_of_the_tokens_that_were_kept(profiled, atp_bundle):
    manifest = Bundle.open(atp_bundle).manifest
    shape = DecoderShape.from_geometry(manifest.geometry)
    rows = [run.counts.layer_rows(manifest) for run in profiled.runs[0]]
    expected = np.mean([decoder_prefill_flops(shape, layers) for layers in rows])
    pruned, unpruned = profiled.report.bundles
    assert pruned.prefill_flops == pytest.approx(expected)
    assert pruned.prefill_flops < unpruned.prefill_flops
    caches = [kv_cache_bytes(shape, [row.attention for row in layers], 4) for layers in rows]
    assert pruned.memory.kv_cache == pytest.approx(np.mean(caches))


def test_sites_and_layers(profiled):
    pruned, unpruned = profiled.report.bundles
    kept = [[site.kept for site in run.answer.sites] for run in profiled.runs[0]]
    for index, site in enumerate(pruned.sites):
        column = [row[index] for row in kept]
        assert (site.kept.min, site.kept.max) == (min(column), max(column))
        assert sum(site.histogram.counts) == 3
        # ATP of this checkpoint has its sites before the layers 1, 2 and 3.
        layer = pruned.layers[index + 1]
        assert (layer.min, layer.max) == (min(column), max(column))
        assert layer.mean == pytest.approx(np.mean(column))
    assert pruned.layers[0].mean == 36
    assert unpruned.sites == ()
    assert unpruned.average_visual_tokens == 36


def test_a_roofline_is_shares_of_the_peak(profiled):
    peak = profiled.report.peak
    for bundle in profiled.report.bundles:
        stage = next(stage for stage in bundle.stages if stage.name == "prefill.segment0")
        seconds = stage.milliseconds.mean / 1000
        assert stage.roofline.flops_share == pytest.approx(stage.flops / seconds / peak.flops_per_second)
        assert stage.roofline.bandwidth_share == pytest.approx(stage.bytes / seconds / peak.bytes_per_second)
        assert stage.roofline.efficiency == pytest.approx(
            stage.roofline.milliseconds / stage.milliseconds.mean
        )


def test_comparisons_are_made_within_a_round(profiled):
    by_scope = {entry.scope: entry for entry in profiled.report.comparisons}
    assert list(by_scope) == ["prefill", "first token", "decode"]
    pruned, unpruned = profiled.runs
    ratios = [a.first_token_ms / b.first_token_ms for a, b in zip(pruned, unpruned, strict=True)]
    entry = by_scope["first token"]
    assert entry.time_ratio.p50 == pytest.approx(np.median(ratios))
    assert entry.saving_efficiency == pytest.approx((1 - np.median(ratios)) / (1 - entry.flops_ratio))
    assert by_scope["decode"].saving_efficiency is None
    assert 0 < by_scope["prefill"].predicted_time_ratio < 1


def test_the_timeline_is_of_the_median_run(profiled):
    for bundle, runs in zip(profiled.report.bundles, profiled.runs, strict=True):
        middle = sorted(runs, key=lambda run: run.first_token_ms)[1]
        assert bundle.timeline == middle.spans
