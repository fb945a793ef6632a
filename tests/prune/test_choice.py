"""Methods as the command line names them."""

import pytest

from edgeprune.errors import PruningError
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.choice import choose_methods
from edgeprune.prune.fastv import FastV
from edgeprune.prune.registry import METHODS
from edgeprune.prune.vtw import Vtw

OWN = """
from dataclasses import dataclass
from typing import ClassVar

from edgeprune.prune.method import PruningMethod
from edgeprune.prune.random_tokens import FixedPatches


@dataclass(frozen=True)
class EveryOther(PruningMethod):
    offset: int = 0

    name: ClassVar[str] = "every-other"

    def check(self, geometry):
        del geometry

    def tokens_per_tile(self, geometry):
        return len(range(self.offset, geometry.num_patches, 2))

    def feature_pruner(self, geometry, tower):
        del tower
        return FixedPatches(tuple(range(self.offset, geometry.num_patches, 2)))
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    yield path
    METHODS.pop("every-other", None)


def test_the_checkpoints_own(atp_folder):
    assert choose_methods(atp_folder, []) is None


def test_none_is_unpruned(atp_folder):
    assert choose_methods(atp_folder, ["none"]) == ()


def test_learned_weights_keep_their_parameters(atp_folder):
    (method,) = choose_methods(atp_folder, ["atp"], settings=["self_weight=0.25"])
    assert (method.layers, method.hidden_width, method.self_weight) == ((1, 2, 3), 8, 0.25)


def test_several_methods(llava_folder):
    chosen = choose_methods(
        llava_folder,
        ["adaptprune", "fastv", "vtw"],
        presets=["adaptprune=upstream"],
        settings=["fastv.layer=8", "vtw.layer=20", "fastv.keep=30"],
    )
    assert chosen == (AdaptPrune(layer=2), FastV(layer=8, keep=30), Vtw(layer=20))


def test_one_method_may_be_named_too(llava_folder):
    (method,) = choose_methods(llava_folder, ["fastv"], ["fastv=demo"], ["fastv.keep=4"])
    assert method == FastV(layer=3, keep_ratio=0.25, keep=4)


def test_a_method_of_ones_own(llava_folder, own_file):
    for _ in range(2):
        (method,) = choose_methods(llava_folder, [f"{own_file}:EveryOther"], settings=["offset=1"])
        assert (type(method), method.offset) == (METHODS["every-other"], 1)


@pytest.mark.parametrize(
    ("names", "presets", "settings", "message"),
    [
        ([], ["paper"], [], "name it with --method"),
        ([], [], ["keep=3"], "name it with --method"),
        (["none", "atp"], [], [], "leave the rest out"),
        (["none"], [], ["keep=3"], "leave the rest out"),
        (["fastvv"], [], [], "unknown pruning method 'fastvv', known: adaptprune, atp, "),
        (["fastv", "vtw"], ["paper"], [], "--preset 'paper' belongs to no method: write fastv=PRESET"),
        (["fastv"], ["vtw=paper"], [], "--preset 'vtw=paper' belongs to no method"),
        (["fastv", "vtw"], [], ["layer=3"], "--set takes fastv.NAME=VALUE"),
        (["fastv"], [], ["vtw.layer=3"], "--set takes NAME=VALUE"),
        (["fastv"], [], ["layer"], "--set takes NAME=VALUE"),
        (["nowhere/own.py:Mine"], [], [], "nowhere/own.py does not exist"),
    ],
)
def test_what_belongs_to_no_method(llava_folder, names, presets, settings, message):
    with pytest.raises(PruningError) as caught:
        choose_methods(llava_folder, names, presets, settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (OWN.replace("EveryOther", "Other"), "has no pruning method 'EveryOther', it has: Other;"),
        ("EveryOther = 3", "has no pruning method 'EveryOther', it has: none;"),
        ("import nothing_of_that_name", "cannot be imported (ModuleNotFoundError: No module named"),
        ("def (", "cannot be imported (SyntaxError: "),
        (OWN.replace("every-other", "atp"), "a pruning method named 'atp' exists already"),
        (OWN.replace("offset: int = 0", "offset: int"), "give the parameter 'offset' a non-empty default"),
    ],
)
def test_files_without_the_method(llava_folder, own_file, source, message):
    own_file.write_text(source)
    with pytest.raises(PruningError) as caught:
        choose_methods(llava_folder, [f"{own_file}:EveryOther"])
    assert message in str(caught.value)
    assert "every-other" not in METHODS
