"""benchmarks/cold_start.py at the smallest size."""

import sys

import pytest
from cold_start import measure
from printed_table import table


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux tells it")
def test_every_start_has_parts_that_make_its_time_up(workdir, small_size, capsys):
    measure(workdir, small_size, (40, 20, 7), rounds=1, warm_up=0)
    printed = capsys.readouterr().out
    starts = table(printed, "bundle | files")
    assert [(row["bundle"], row["files"]) for row in starts] == [
        (name, state) for name in ("unpruned", "atp") for state in ("warm", "cold")
    ]
    for row in starts:
        parts = [float(row[part]) for part in ("imports s", "opening s", "answering s")]
        assert min(parts) > 0
        assert float(row["first token s"]) == pytest.approx(sum(parts), abs=0.02)  # four times rounded
    opened = table(printed, "bundle | opened by")
    assert len(opened) == 6
    assert all(float(row["s"]) > 0 for row in opened)
