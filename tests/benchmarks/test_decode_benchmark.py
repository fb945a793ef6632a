"""benchmarks/decode.py at the smallest size."""

import pytest
from decode import measure
from printed_table import table


@pytest.fixture
def rows(workdir, small_size, capsys):
    measure(workdir, small_size, (40, 20, 7), (128, 192), steps=6)
    return {
        (row["rows of the prompt"], row["bundle"]): row
        for row in table(capsys.readouterr().out, "rows of the prompt")
    }


def test_caches_hold_what_each_method_left_of_the_prompt(rows):
    assert set(rows) == {
        (length, name) for length in ("128", "192") for name in ("unpruned", "ATP", "DyRate")
    }
    # Seven tokens were generated, the first of them before the clock started.
    assert rows["128", "unpruned"]["rows cached"] == "135"
    assert rows["128", "unpruned"]["of unpruned"] == "1.000"
    # One layer with all 64 visual tokens, then one with each of the counts.
    assert rows["128", "ATP"]["kept"] == "40, 20, 7"
    assert float(rows["128", "ATP"]["rows cached"]) == round(64 + 7 + (64 + 40 + 20 + 7) / 4)
    first, *later = rows["128", "DyRate"]["kept"].split("; ")
    assert first == "32"
    assert later
    assert all(float(row["tok/s"]) > 0 for row in rows.values())
