"""Times of prefill: the cost model's operations, or a measured table."""

import json

import pytest

from edgeprune.bundle import Bundle
from edgeprune.calib.prefill_time import SegmentFlops, read_latency_tables
from edgeprune.cost import DecoderShape, LayerRows, decoder_prefill_flops
from edgeprune.errors import DataError


@pytest.mark.parametrize("bundle", ["atp_bundle", "ivtp_bundle", "cdpruner_bundle"])
def test_all_segments_together_are_the_decoder(bundle, request):
    manifest = Bundle.open(request.getfixturevalue(bundle)).manifest
    shape = DecoderShape.from_geometry(manifest.geometry)
    whole = decoder_prefill_flops(shape, [LayerRows(50, 50)] * shape.num_layers)
    assert sum(SegmentFlops.of(manifest, i)(50) for i in range(len(manifest.segments))) == whole


def test_a_table_is_read_between_its_rows(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"segment0": {"100": 4, "20": 2.0}}))
    table = read_latency_tables(path, ["segment0"])["segment0"]
    assert [table(rows) for rows in (20, 60, 100)] == [2.0, 3.0, 4.0]
    for rows in (19, 101):
        with pytest.raises(DataError, match=f"holds 20 … 100 rows, {rows} were seen"):
            table(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "must name the segments segment0 and no others"),
        ("{}", "must name the segments segment0 and no others"),
        ('{"segment0": {"1": 1}, "segment9": {"1": 1}}', "must name the segments segment0 and no others"),
        ('{"segment0": {}}', "segment0 has no times"),
        ('{"segment0": 3}', "segment0 has no times"),
        ('{"segment0": {"a": 1}}', "has 1 for 'a' rows"),
        ('{"segment0": {"-3": 1}}', "has 1 for '-3' rows"),
        ('{"segment0": {"3": 0}}', "has 0 for '3' rows"),
        ('{"segment0": {"3": true}}', "has True for '3' rows"),
        ('{"segment0": {"3": NaN}}', "has nan for '3' rows"),
        ('{"segment0": {"3": "fast"}}', "has fast for '3' rows"),
    ],
)
def test_a_malformed_table(tmp_path, text, message):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_latency_tables(path, ["segment0"])
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_latency_tables(tmp_path / "latency.json", ["segment0"])
