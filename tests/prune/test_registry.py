import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from edgeprune.errors import PruningError
from edgeprune.prune.atp import Atp
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.random_tokens import FixedPatches, RandomTokens
from edgeprune.prune.registry import METHODS, method_from_parameters, methods_to_json, register_method


@pytest.fixture
def own_method():
    """A method of a user's own, known for the length of a test."""

    @register_method
    @dataclass(frozen=True)
    class EveryOther(PruningMethod):
        offset: int = 0
        rate: float = 0.5
        fast: bool = True

        name: ClassVar[str] = "every-other"

        def check(self, geometry):
            del geometry

        def tokens_per_tile(self, geometry):
            return len(range(self.offset, geometry.num_patches, 2))

        def feature_pruner(self, geometry, tower):
            del tower
            return FixedPatches(tuple(range(self.offset, geometry.num_patches, 2)))

    yield EveryOther
    del METHODS["every-other"]


@pytest.mark.parametrize(
    "method",
    [
        Atp(
            layers=(2, 5),
            sample_scale=2.5,
            strides=(3,),
            hidden_width=7,
            self_norm="minmax",
            cross_norm="sigmoid",
        ),
        Ivtp(100, 50, 8, 2, "all", 0.3),
        RandomTokens(keep=9, seed=4),
    ],
)
def test_methods_survive_json(method):
    (entry,) = json.loads(json.dumps(methods_to_json([method])))
    assert method_from_parameters(entry["method"], entry["parameters"]) == method


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_builds(name):
    assert METHODS[name].presets
    for preset, values in METHODS[name].presets.items():
        method = method_from_parameters(name, {"preset": preset})
        assert all(getattr(method, field) == value for field, value in values.items())


def test_parameters_override_the_preset():
    method = method_from_parameters("atp", {"preset": "paper-88", "hidden_width": 16})
    assert method == Atp(layers=(1, 13, 25), hidden_width=16)


def test_an_integer_is_a_number():
    assert method_from_parameters("atp", {"sample_scale": 3}).sample_scale == 3.0
    assert isinstance(method_from_parameters("atp", {"sample_scale": 3}).sample_scale, float)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "fastvv",
            {},
            "unknown pruning method 'fastvv', known: adaptprune, atp, ",
        ),
        ("atp", {"preset": "paper"}, "atp: unknown preset 'paper', known: paper-144, paper-88"),
        ("atp", {"preset": ["paper-88"]}, "atp: unknown preset '['paper-88']', known: paper-144, paper-88"),
        ("random", {"keeps": 3}, "random: unknown parameter 'keeps', known: keep, keep_ratio, seed, at"),
        ("random", {"keep": "3"}, "random: 'keep' is '3', expected int"),
        ("random", {"keep": 3.0}, "random: 'keep' is 3.0, expected int"),
        ("random", {"keep": True}, "random: 'keep' is True, expected int"),
        ("random", {"keep": None}, "random: 'keep' is None, expected int"),
        ("atp", {"layers": 4}, "atp: 'layers' is 4, expected a list of int"),
        ("atp", {"layers": [4, "5"]}, "atp: 'layers' is [4, '5'], expected a list of int"),
        ("atp", {"layers": [4, True]}, "atp: 'layers' is [4, True], expected a list of int"),
        ("atp", {"layers": []}, "atp: 'layers' is empty"),
        ("atp", {"sample_scale": "3"}, "atp: 'sample_scale' is '3', expected float"),
        ("atp", {"self_norm": 1}, "atp: 'self_norm' is 1, expected str"),
    ],
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(PruningError) as error:
        method_from_parameters(name, parameters)
    assert message in str(error.value)


def test_own_method(own_method):
    method = method_from_parameters("every-other", {"offset": 1, "rate": 1, "fast": False})
    assert method == own_method(offset=1, rate=1.0, fast=False)
    assert register_method(own_method) is own_method
    with pytest.raises(PruningError, match="'fast' is 1, expected bool"):
        method_from_parameters("every-other", {"fast": 1})


def test_a_name_is_taken_once(own_method):
    @dataclass(frozen=True)
    class Impostor(RandomTokens):
        name: ClassVar[str] = "every-other"

    with pytest.raises(PruningError, match="named 'every-other' exists already: choose another name"):
        register_method(Impostor)
    assert METHODS["every-other"] is own_method
