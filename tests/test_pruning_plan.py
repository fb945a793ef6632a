from dataclasses import replace

import pytest
import torch
from tiny_checkpoints import random_prompt

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.prune.atp import Atp, AtpSelector
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import ModelGeometry, PruningMethod
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.pruning_plan import PruningPlan

GEOMETRY = ModelGeometry(
    num_layers=8, hidden_size=32, num_heads=4, head_dim=8, grid=(6, 6), vision_layers=3, has_class_token=True
)


class OwnMethod(PruningMethod):
    """A user's, which checks nothing."""

    name = "own"

    def check(self, geometry):
        pass


def plan(*methods):
    return PruningPlan(methods, GEOMETRY)


def mlp(layer):
    return Cut(layer, before_mlp=True)


def test_unpruned():
    empty = plan()
    assert empty.sites == ()
    assert empty.segment_cuts == (Cut(0), Cut(8))
    assert empty.tokens_per_tile is empty.probe is empty.vision_pruner() is None
    assert empty.weight_shapes() == {}


def test_atp_with_random():
    both = plan(Atp(layers=(2, 5)), RandomTokens(keep=10))
    assert [site.name for site in both.sites] == ["site0", "site1"]
    assert both.segment_cuts == (Cut(0), Cut(2), Cut(5), Cut(8))
    assert both.tokens_per_tile == 10
    assert both.vision_pruner() is None
    assert len(both.weight_shapes()) == 12
    # The heads are as wide as the grid, whatever the random choice leaves of it.
    assert both.weight_shapes()["atp.site1.proj.weight"] == (256, 72)


def test_sites_of_two_methods_follow_the_decoder():
    both = plan(Atp(layers=(4, 6), hidden_width=3), Ivtp(20, 10, decoder_layers=2, group_size=1))
    assert [site.site.cut for site in both.sites] == [mlp(0), mlp(1), Cut(4), Cut(6)]
    assert [(site.name, site.method.name, site.index) for site in both.sites] == [
        ("site0", "ivtp", 0),
        ("site1", "ivtp", 1),
        ("site2", "atp", 0),
        ("site3", "atp", 1),
    ]
    assert both.tokens_per_tile == 20
    assert both.probe.layers == (0, 1)
    # Every site gets the weights of its own method and number.
    weights = {name: torch.randn(shape) for name, shape in both.weight_shapes().items()}
    selector = both.sites[3].selector(GEOMETRY, weights, None)
    assert isinstance(selector, AtpSelector)
    assert torch.equal(selector.heads.proj.weight, weights["atp.site1.proj.weight"])
    assert selector.layer == 6


def test_two_methods_in_one_decoder_run(llava_folder, atp_folder, tmp_path):
    atp = load_checkpoint(atp_folder).plan.methods[0]
    one = Atp(layers=(3,), hidden_width=atp.hidden_width)
    ivtp = Ivtp(20, 10, decoder_layers=2, group_size=2, text_selection="all")
    model = load_checkpoint(atp_folder, methods=[one, ivtp])
    ids, pixels = random_prompt(tokens_per_image=20)
    first, second = model.prefill(ids, pixels).sites
    assert (first.tokens_in, first.kept) == (20, 10) == (20, second.tokens_in)
    assert set(second.slots) < set(first.slots)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Atp(layers=(0,))], "atp: a site before layer 0 is out of range: this decoder allows layers 1 … 7"),
        ([Atp(layers=(8,))], "atp: a site before layer 8 is out of range: this decoder allows layers 1 … 7"),
        ([Atp(layers=(5, 2))], "atp: layers [5, 2] are out of order: list them increasing, each once"),
        ([Atp(layers=(2, 2))], "atp: layers [2, 2] are out of order"),
        ([Ivtp(20, 10, decoder_layers=9)], "'decoder_layers' is 9, but the decoder has 8 layers"),
        (
            [Ivtp(120, 64, decoder_layers=3)],
            "'tokens_after_vision' is 120, but a picture has 36 visual tokens",
        ),
        ([RandomTokens(keep=37)], "'keep' is 37, but a picture has 36 visual tokens"),
        (
            [RandomTokens(keep=3), RandomTokens(keep=4)],
            "a pruning method is listed twice in ['random', 'random']",
        ),
        (
            [RandomTokens(keep=3), Ivtp(20, 10, decoder_layers=3)],
            "random and ivtp both prune before the decoder: combine methods whose places differ",
        ),
    ],
)
def test_plans_that_fit_no_model_are_refused(methods, message):
    with pytest.raises(PruningError) as error:
        plan(*methods)
    assert message in str(error.value)


def test_a_feature_pruner_for_another_tower_than_clips_is_refused():
    class BehindTheTower(OwnMethod):
        def tokens_per_tile(self, geometry):
            del geometry
            return 9

    class InTheTower(BehindTheTower):
        def vision_pruner(self, geometry):
            del geometry
            return torch.nn.Identity()

    other = replace(GEOMETRY, has_clip_tower=False)
    assert plan(BehindTheTower()).tokens_per_tile == 9
    assert PruningPlan((InTheTower(),), other).tokens_per_tile == 9
    with pytest.raises(PruningError, match="own drops tokens between the vision tower and the projector"):
        PruningPlan((BehindTheTower(),), other)


def test_a_site_between_another_site_and_what_it_reads_is_refused(atp_folder):
    # ATP before layer 2 reads the queries of layer 1 with all rows; IVTP drops rows inside layer 1.
    atp = Atp(layers=(2,), hidden_width=8)
    ivtp = Ivtp(20, 10, decoder_layers=2, group_size=2, text_selection="all")
    with pytest.raises(PruningError) as error:
        load_checkpoint(atp_folder, methods=[atp, ivtp])
    assert "atp: the site before layer 2 reads 'query.1'" in str(error.value)
    assert "before the MLP of layer 1): move one of the two" in str(error.value)
