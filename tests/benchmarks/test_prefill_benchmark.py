"""benchmarks/prefill.py at the smallest size."""

import contextlib
import io

import pytest
from prefill import Plan, measure
from printed_table import table


@pytest.fixture(scope="module")
def printed(workdir, small_size):
    output = io.StringIO()
    bundles = ("unpruned", "ATP", "FastV")
    with contextlib.redirect_stdout(output):
        measure(workdir, Plan(small_size, (40, 20, 7), 2, (48, 128, 192), rounds=2, bundles=bundles))
    return output.getvalue()


def test_every_decoder_has_a_prefill_and_ratios_of_it(printed):
    assert [row["decoder"] for row in table(printed, "decoder")] == [
        "transformers SDPA",
        "unpruned bundle",
        "bundle pruned by ATP",
        "text only, one graph",
        "text only, chain",
    ]
    ratios = {row["ratio"]: float(row["median"]) for row in table(printed, "ratio")}
    assert 0 < ratios["pruned / unpruned, prefill FLOPs"] < 1
    assert len(ratios) == 9


def test_atp_keeps_exactly_what_was_asked_for(printed):
    assert "visual tokens behind ATP's sites: [40, 20, 7], asked for: [40, 20, 7]" in printed


def test_several_requests_are_compared_with_a_batch_of_transformers(printed):
    rows = table(printed, "requests")
    assert [row["decoder"] for row in rows] == ["transformers SDPA", "unpruned", "ATP"]
    assert {row["requests"] for row in rows} == {"2"}
    assert all(float(row["prefill ms"]) > 0 and float(row["decode ms/step"]) > 0 for row in rows)


def test_prompts_grow_by_whole_pictures_and_methods_keep_their_share(printed):
    rows = {(row["rows of the prompt"], row["bundle"]): row for row in table(printed, "rows of the prompt")}
    assert [rows[length, "unpruned"]["pictures"] for length in ("48", "128", "192")] == ["0", "1", "2"]
    assert rows["48", "FastV"]["kept"] == "-"
    assert rows["128", "FastV"]["kept"] == "32"
    assert rows["192", "FastV"]["kept"] == "64"
    assert rows["128", "ATP"]["kept"] == "40, 20, 7"
    assert float(rows["128", "ATP"]["FLOPs"]) < float(rows["128", "FastV"]["FLOPs"]) < 1
    assert rows["48", "ATP"]["saving efficiency"] == rows["128", "unpruned"]["saving efficiency"] == "-"
    assert rows["128", "unpruned"]["selecting, of unpruned"] == "0.00%"
    assert float(rows["128", "ATP"]["selecting, of unpruned"].rstrip("%")) > 0
