"""Costs of stages against sums written out by hand and against the cost model's own totals."""

from dataclasses import replace

import pytest
from geometries import geometry_entry
from tiny_manifest import with_deepstack, write_files

from edgeprune.cost import DecoderShape, VisionShape, decode_step_flops, decoder_prefill_flops, vision_flops
from edgeprune.manifest import SegmentEntry, SiteEntry
from edgeprune.stage_cost import PromptCounts, StageCost, decode_cost, prompt_costs

# d = 8, m = 16, H·D = 8, Hkv·D = 4, V = 100; two layers, one site between them.
COUNTS = PromptCounts(tiles=(9,), entering=9, kept=(4,), text=5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("manifest") / "bundle")


def test_a_segment_by_hand(manifest):
    cost = prompt_costs(manifest, COUNTS)["prefill.segment0"]
    n = 14
    attention = 2 * (2 * n * 8 * (8 + 4) + 2 * n * n * 8)
    mlp = 2 * 3 * n * 8 * 16
    assert cost.flops == attention + mlp
    assert cost.weights == (8 * 8 + 2 * 8 * 4 + 8 * 8) + 3 * 8 * 16
    # Two blocks read and write n rows of 8; keys and values of n rows are written.
    assert cost.values == 2 * 2 * n * 8 + 2 * n * 4


def test_the_last_segment_has_the_head_on_one_row(manifest):
    first, last = (prompt_costs(manifest, COUNTS)[f"prefill.segment{index}"] for index in (0, 1))
    assert last.weights == first.weights + 8 * 100
    n = 9
    assert last.flops == 2 * (2 * n * 8 * 12 + 2 * n * n * 8) + 6 * n * 8 * 16 + 2 * 8 * 100


def test_segments_add_up_to_the_decoders_prefill(manifest):
    costs = prompt_costs(manifest, COUNTS)
    total = sum(cost.flops for name, cost in costs.items() if name.startswith("prefill."))
    shape = DecoderShape.from_geometry(manifest.geometry)
    assert total == decoder_prefill_flops(shape, COUNTS.layer_rows(manifest))


def test_tower_and_projector(manifest):
    costs = prompt_costs(manifest, replace(COUNTS, tiles=(9, 9)))
    shape = VisionShape.from_geometry(manifest.geometry)
    assert costs["vision"].flops == 2 * vision_flops(shape)
    # Two tiles, one set of weights.
    assert costs["vision"].weights == 4 * 8 * 8 + 2 * 8 * 16
    assert costs["projector"] == StageCost(2 * 9 * (64 + 64), 64 + 64, 9 * 16)


def test_deepstack_projects_lays_and_adds(manifest):
    """A merger more for the first layer, as large as the projector; its features are laid into rows and read once."""
    plain, added = (prompt_costs(m, COUNTS) for m in (manifest, with_deepstack(manifest, 1)))
    projector = plain["projector"]
    twice = StageCost(2 * projector.flops, 2 * projector.weights, 2 * projector.values)
    assert added["projector"] == twice
    assert added["embed"].values == 2 * plain["embed"].values
    before, behind = plain["prefill.segment0"], added["prefill.segment0"]
    assert behind == replace(before, values=before.values + 14 * 8)
    assert added["prefill.segment1"] == plain["prefill.segment1"]
    step, more = (decode_cost(m, (14, 9)) for m in (manifest, with_deepstack(manifest, 2)))
    assert more == replace(step, values=step.values + 2 * 8)


def test_a_picture_of_another_size_has_a_tower_of_its_own(manifest):
    (one, other) = (
        prompt_costs(manifest, replace(COUNTS, tiles=(tokens,)))["vision"].flops for tokens in (9, 18)
    )

    def by_hand(rows: int) -> int:
        return 2 * (rows * (4 * 64 + 2 * rows * 8) + 2 * rows * 8 * 16)

    assert (one, other) == (by_hand(10), by_hand(19))


def test_a_tower_that_drops_half_drops_half_of_any_picture(manifest):
    # 9 of 18 tokens leave the only layer's attention; its MLP sees 1 + 9 rows, of a picture of 36 tokens 1 + 18.
    geometry = geometry_entry(grid=(3, 6), vision_tokens=(10,))
    cost = prompt_costs(replace(manifest, geometry=geometry), replace(COUNTS, tiles=(36,)))["vision"]
    assert cost.flops == 2 * (37 * (4 * 64 + 2 * 37 * 8) + 2 * 19 * 8 * 16)


def test_a_site_inside_a_layer(manifest):
    sites = (SiteEntry("site0", "ivtp", "before the MLP of layer 0", 0, before_mlp=True, keep_per_image=4),)
    segments = (
        SegmentEntry("segment0", (0,), (), probe=False),
        SegmentEntry("segment1", (1,), (0, 1), probe=False),
    )
    costs = prompt_costs(replace(manifest, sites=sites, segments=segments), COUNTS)
    assert costs["prefill.segment0"].flops == 2 * (2 * 14 * 8 * 12 + 2 * 14 * 14 * 8)
    assert costs["prefill.segment1"].weights == 2 * 8 * 12 + 2 * 3 * 8 * 16 + 8 * 100


def test_a_decode_step_reads_caches_and_every_weight(manifest):
    cost = decode_cost(manifest, (14, 9))
    shape = DecoderShape.from_geometry(manifest.geometry)
    assert cost.flops == decode_step_flops(shape, (14, 9))
    layer = 2 * 8 * 12 + 3 * 8 * 16
    assert cost.weights == 2 * layer + 8 * 100 + 8
    assert cost.values == 4 * 2 * 8 + 2 * 4 * (14 + 9 + 2) + 8 + 100


def test_text_alone_has_no_tower_and_skips_the_sites(manifest):
    costs = prompt_costs(manifest, PromptCounts(tiles=(), entering=0, kept=(), text=5))
    assert set(costs) == {"embed", "prefill.segment0", "prefill.segment1"}


def test_bytes_of_narrow_weights():
    assert StageCost(1, 100, 10).bytes(0.5, 2) == 70


@pytest.mark.parametrize("rows", [(14,), (14, 9, 9)])
def test_caches_of_other_layers(manifest, rows):
    with pytest.raises(ValueError, match="for a decoder of 2"):
        decode_cost(manifest, rows)


def test_a_cost_below_zero():
    with pytest.raises(ValueError, match="'weights' is -1"):
        StageCost(0, -1, 0)
