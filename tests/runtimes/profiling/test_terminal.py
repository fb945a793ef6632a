"""The tables, as a person without colours reads them."""

import io

import pytest
from rich.console import Console

from edgeprune.runtimes.profiling.summary import Histogram
from edgeprune.runtimes.profiling.terminal import render_profile, sparkline

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")


@pytest.fixture(scope="module")
def text(profiled):
    console = Console(file=io.StringIO(), width=100)
    console.print(render_profile(profiled.report))
    return console.file.getvalue()


def test_it_fits_a_terminal(text):
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize(
    "expected",
    [
        "Profile of atp (atp) against atp-unpruned",
        "time to first token, p50 ms",
        "saving efficiency",
        "prefill.segment3",
        "wait.site1",
        "decode step",
        "before layer 2",
        "Predicted, not measured: Jetson AGX Orin 64 GB, int8",
        "Knee: 208 tokens",
        "Note: Of fewer than 20 runs",
    ],
)
def test_what_it_says(text, expected):
    assert expected in " ".join(text.split())


def test_every_stage_of_every_bundle_has_a_row(text, profiled):
    for bundle in profiled.report.bundles:
        part = text.partition(f"Stages of {bundle.name},")[2].partition("Stages of")[0]
        for stage in bundle.stages:
            shown = {"host": "rest of the host", "decode": "decode step"}.get(stage.name, stage.name)
            assert shown.removeprefix("decode.") in part


@pytest.mark.parametrize(
    ("histogram", "expected"),
    [
        (Histogram((3, 4, 5, 6), (8, 0, 1)), "3 █ ▁ 5"),
        (Histogram((9, 10), (20,)), "always 9"),
        (Histogram((0, 4, 8), (1, 2)), "0 ▄█ 7"),
    ],
)
def test_a_histogram_in_one_line(histogram, expected):
    assert sparkline(histogram) == expected
