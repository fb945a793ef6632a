"""The roofline against data sheets and hand calculations."""

import pytest

from edgeprune.errors import TargetError
from edgeprune.roofline import Rates, default_precision, target_rates
from edgeprune.stage_cost import StageCost
from edgeprune.targets import find_target

# 100 operations and 10 bytes a second, weights of two bytes.
SLOW = Rates(100.0, 10.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("target", "precision", "tokens"),
    # 42.6 TFLOP/s, 204.8 GB/s: 42.6e12 · 2 / (2 · 204.8e9), a quarter with weights of half a byte.
    [("agx-orin-64", "fp16", 208), ("agx-orin-64", "int4", 52), ("agx-orin-64", "int8", 208)],
)
def test_the_knee_of_a_data_sheet(target, precision, tokens):
    assert target_rates(find_target(target), precision).knee_tokens == pytest.approx(tokens, abs=0.5)


def test_the_knee_of_a_data_centre_gpu():
    # H200 NVL: 835 dense TFLOP/s in fp16, 4.8 TB/s.
    assert Rates(835e12, 4.8e12, 2, 2).knee_tokens == pytest.approx(174, abs=0.5)


def test_a_stage_takes_the_longer_of_computing_and_moving():
    computing, moving = StageCost(2000, 20, 5), StageCost(200, 20, 5)
    assert (SLOW.seconds(computing), SLOW.bound(computing)) == (20.0, "compute")
    assert (SLOW.seconds(moving), SLOW.bound(moving)) == (5.0, "memory")


def test_at_the_knee_computing_and_reading_take_the_same_time():
    weights = 1000
    at_the_knee = StageCost(round(2 * weights * SLOW.knee_tokens), weights, 0)
    assert SLOW.compute_seconds(at_the_knee) == pytest.approx(SLOW.memory_seconds(at_the_knee))


def test_the_precision_of_a_prediction():
    orin = find_target("agx-orin-64")
    assert default_precision(orin, "float16") == "fp16"
    # No rate for float32 in the data sheet: engines are built in half precision.
    assert default_precision(orin, "float32") == "fp16"


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp8", "has no fp8"), ("bf16", "rate in bf16 is unknown, known are fp16, int8"), ("int3", "unknown")],
)
def test_a_precision_that_cannot_be_predicted(precision, expected):
    with pytest.raises(TargetError, match=expected):
        target_rates(find_target("agx-orin-64"), precision)


def test_rates_must_be_rates():
    with pytest.raises(ValueError, match="'bytes_per_second' is 0"):
        Rates(1.0, 0, 2, 2)
