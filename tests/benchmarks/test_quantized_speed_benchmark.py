"""benchmarks/quantized_speed.py at the smallest size."""

import contextlib
import io

from printed_table import table
from quantized_speed import measure


def test_every_precision_is_measured_unpruned_and_pruned(workdir, small_size):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        measure(workdir, small_size, (40, 20, 7), rounds=1)
    rows = {(row["weights"], row["bundle"]): row for row in table(output.getvalue(), "weights")}
    assert list(rows) == [
        (weights, bundle) for weights in ("float32", "INT8", "INT4") for bundle in ("unpruned", "ATP")
    ]
    assert rows["float32", "ATP"]["kept"] == "40, 20, 7"
    for (_, bundle), row in rows.items():
        assert float(row["prefill ms"]) > 0
        assert float(row["decode ms/token"]) > 0
        assert (float(row["FLOPs of unpruned"]) < 1) == (bundle == "ATP")
