"""benchmarks/cpp_run.py at the smallest size; here, because it needs the library."""

import argparse
import sys

import pytest
from conftest import SANITIZE
from cpp_run import measure
from printed_table import table


@pytest.mark.skipif(SANITIZE, reason="Python cannot load a library with sanitizers")
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux tells it")
def test_both_languages_are_measured_and_compared(cpp, unpruned_bundle, capsys):
    options = argparse.Namespace(rounds=1, answers=1, tokens=3, threads=1)
    met = measure(unpruned_bundle, cpp.built, options, warm_up=0)
    printed = capsys.readouterr().out
    rows = table(printed, "ms")
    assert [row["ms"] for row in rows] == [
        "opening",
        "first token",
        "each further token",
        "program, start to end of one token",
    ]
    for row in rows:
        ratio = float(row["C++"]) / float(row["Python"])
        assert float(row["C++ / Python"]) == pytest.approx(
            ratio, abs=0.01 + 0.01 * ratio / float(row["Python"])
        )
        assert row["C++ no slower"] == ("met" if float(row["C++ / Python"]) <= 1 else "missed")
    assert met == all(row["C++ no slower"] == "met" for row in rows)
    assert "C++: opening adds RssAnon" in printed
