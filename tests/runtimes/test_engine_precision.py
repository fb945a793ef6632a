"""Precisions: the bundle decides, the device must have it, and a wish that contradicts is refused with the way out."""

from pathlib import Path

import pytest

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError, TargetError
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_precision import engine_precision
from edgeprune.targets import find_target


@pytest.mark.parametrize(("bundle", "own"), [("atp_bundle", "fp32"), ("atp_float16_bundle", "fp16")])
def test_the_bundle_decides(bundle, own, request):
    manifest = Bundle.open(request.getfixturevalue(bundle)).manifest
    target = find_target("orin-nx-8")
    assert engine_precision(manifest, target) == own
    assert engine_precision(manifest, target, own) == own
    other = {"fp32": "fp16", "fp16": "fp32"}[own]
    dtype = {"fp32": "float32", "fp16": "float16"}[other]
    with pytest.raises(EngineError, match=f"the bundle is {own} .* export with --dtype {dtype} for {other}"):
        engine_precision(manifest, target, other)
    with pytest.raises(EngineError, match=f"need a bundle quantized to int8, and this one is {own}"):
        engine_precision(manifest, target, "int8")


def test_a_target_that_lacks_the_bundles_precision_is_refused_with_what_it_has(atp_float16_bundle: Path):
    import dataclasses

    manifest = Bundle.open(atp_float16_bundle).manifest
    old = dataclasses.replace(find_target("rtx30"), precisions=("fp32",), tops={})
    with pytest.raises(TargetError, match="has no fp16: choose fp32"):
        engine_precision(manifest, old)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "rtx99"}, TargetError, "is unknown"),
        (
            {"target": "rtx30", "precision": "fp8"},
            TargetError,
            "has no fp8: choose fp32, fp16, bf16, int8, int4",
        ),
        ({"target": "rtx30", "precision": "half"}, TargetError, "precision 'half' is unknown"),
        ({"target": "rtx30", "workspace_mib": 0.0}, EngineError, "--workspace is 0 MiB"),
        ({"target": "rtx30", "memory_gib": float("nan")}, EngineError, "--memory is nan GiB"),
    ],
)
def test_options_check_themselves(options, error, message):
    with pytest.raises(error, match=message):
        BuildOptions(**options)


def test_another_memory_keeps_the_reserve():
    """Half a GiB of a card is not for engines."""
    assert BuildOptions("rtx40").usable_bytes == int(7.5 * 2**30)
    assert BuildOptions("rtx40", memory_gib=16).usable_bytes == int(15.5 * 2**30)
    assert BuildOptions("rtx40", memory_gib=0.1).usable_bytes == 0
