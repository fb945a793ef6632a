"""benchmarks/gpu.py at the smallest size, with everything but the GPU."""

from gpu import Plan, measure
from printed_table import table


def test_every_decoder_is_measured_and_a_provider_that_is_missing_is_named(tmp_path, small_size, capsys):
    plan = Plan(small_size, (40, 20, 7), ("fastv",), ("cpu", "tensorrt"), rounds=1, device="cpu")
    measure(tmp_path, plan)
    printed = capsys.readouterr().out
    rows = table(printed, "provider")
    assert [(row["provider"], row["decoder"], row["kept"]) for row in rows] == [
        ("-", "transformers SDPA", "-"),
        ("cpu", "unpruned", "-"),
        ("cpu", "fastv", "32"),
    ]
    assert all(float(row["prefill ms"]) > 0 and float(row["decode ms/token"]) > 0 for row in rows)
    assert (
        "fastv with tensorrt was not measured: this onnxruntime has no TensorrtExecutionProvider" in printed
    )
    assert not (tmp_path / "fastv").exists()
