"""Targets: the table is consistent, lacks nothing, and refuses what a device cannot do."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from edgeprune.cli import main
from edgeprune.errors import TargetError
from edgeprune.targets import GIB, PRECISIONS, TARGETS, find_target, targets

ORINS = ("orin-nano-4", "orin-nano-8", "orin-nx-8", "orin-nx-16", "agx-orin-32", "agx-orin-64")


def test_every_device_is_there():
    assert tuple(TARGETS) == (*ORINS, "rtx30", "rtx40", "rtx50", "dgx-spark")
    assert [TARGETS[name].sm for name in TARGETS] == [87] * 6 + [86, 89, 120, 121]
    assert [TARGETS[name].memory_bytes // GIB for name in ORINS] == [4, 8, 8, 16, 32, 64]


@pytest.mark.parametrize("name", TARGETS)
def test_rates_rise_as_numbers_get_narrower(name):
    rates = TARGETS[name].tops
    assert rates["int8"] == pytest.approx(2 * rates["fp16"], rel=0.01)
    for wide, narrow in (("fp16", "fp8"), ("fp8", "fp4")):
        if narrow in rates:
            assert rates[narrow] == pytest.approx(2 * rates[wide], rel=0.01)


# What the vendor prints: sparse INT8 without the DLA, and sparse FP8 or FP4 "AI TOPS" of GeForce cards.
@pytest.mark.parametrize(
    ("name", "precision", "sparse"),
    [
        ("orin-nano-8", "int8", 67),
        ("orin-nano-4", "int8", 34),
        ("agx-orin-64", "int8", 170),
        ("agx-orin-32", "int8", 108),
        ("rtx30", "int8", 204),
        ("rtx40", "fp8", 242),
        ("rtx50", "fp4", 614),
        ("dgx-spark", "fp4", 1000),
    ],
)
def test_dense_rates_are_half_of_the_printed_sparse_ones(name, precision, sparse):
    assert TARGETS[name].tops[precision] == pytest.approx(sparse / 2, rel=0.03)


@pytest.mark.parametrize("name", ORINS)
@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_no_narrow_floats_on_orin(name, precision):
    with pytest.raises(TargetError, match=rf"has no {precision}: choose fp32, fp16, bf16, int8, int4$"):
        TARGETS[name].check_precision(precision)


def test_what_a_device_has_is_accepted():
    for target in TARGETS.values():
        for precision in target.precisions:
            target.check_precision(precision)
    with pytest.raises(TargetError, match="'fp64' is unknown, known: fp32"):
        TARGETS["rtx50"].check_precision("fp64")


def test_an_unknown_target_is_named_with_the_known_ones():
    with pytest.raises(TargetError, match=r"target 'orin' is unknown, known: orin-nano-4, .*, this"):
        find_target("orin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Orin Nano"}, "cannot be called"),
        ({"sm": 8}, "no compute capability"),
        ({"memory_bytes": 0}, "must be positive"),
        ({"tops": {"int8": 0.0}}, "must be positive"),
        ({"precisions": ("fp16", "fp64")}, "precision fp64"),
        ({"precisions": ()}, "precision missing"),
        ({"precisions": ("fp16",)}, "a rate for a precision that it lacks"),
        ({"tensorrt": ("new", "11")}, "versions look like"),
        ({"architecture": "riscv"}, "architecture 'riscv'"),
    ],
)
def test_a_target_checks_itself(change, message):
    with pytest.raises(TargetError, match=message):
        dataclasses.replace(TARGETS["orin-nano-8"], **change)


def test_shared_memory_leaves_more_to_the_system():
    assert TARGETS["orin-nano-8"].usable_bytes < TARGETS["rtx40"].usable_bytes < 8 * GIB


def test_the_command_prints_the_table():
    result = CliRunner().invoke(main, ["targets"])
    assert result.exit_code == 0
    for name in TARGETS:
        assert f" {name} " in result.stdout


def test_the_command_prints_json():
    result = CliRunner().invoke(main, ["targets", "--json"])
    printed = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert set(printed) == {target.name for target in targets()} >= set(TARGETS)
    assert printed["orin-nx-16"]["memory_bytes"] == 16 * GIB
    assert printed["orin-nx-16"]["shared_memory"] is True
    assert set(printed["rtx50"]["precisions"]) == set(PRECISIONS)
