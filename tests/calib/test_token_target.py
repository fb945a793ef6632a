import itertools

import pytest

from edgeprune.calib.atp_trainer import start_counts
from edgeprune.calib.token_target import TokenTarget, check_reachable
from edgeprune.errors import PruningError


@pytest.mark.parametrize(
    ("text", "tokens"), [("144", 144), ("35.5", 35.5), ("25%", 144), (" 12.5 % ", 72), ("1e2", 100)]
)
def test_a_target_is_a_number_or_a_share(text, tokens):
    assert TokenTarget.parse(text).tokens(576) == pytest.approx(tokens)


@pytest.mark.parametrize("text", ["", "%", "many", "0", "-3", "0%", "100%", "140%", "nan", "nan%", "inf"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(PruningError, match="target"):
        TokenTarget.parse(text)


def test_the_range_is_named_and_what_widens_it():
    check_reachable("atp", 20, 12, 36, "begin earlier")
    with pytest.raises(PruningError, match=r"more than 12\.0 and less than 36: choose one between, or begin"):
        check_reachable("atp", 12, 12, 36, "begin earlier")
    with pytest.raises(PruningError, match=r"choose one between$"):
        check_reachable("atp", 36, 12, 36, "begin earlier")


@pytest.mark.parametrize(
    ("layers", "num_layers", "patches", "target"),
    [((4, 14, 24), 32, 576, 144), ((1, 13, 25), 32, 576, 88), ((1, 4, 8), 12, 144, 36), ((2,), 4, 36, 20)],
)
def test_sites_begin_so_that_the_mean_over_the_layers_is_the_target(layers, num_layers, patches, target):
    counts = (patches, *start_counts(layers, num_layers, patches, target))
    mean = sum(counts[sum(layer >= at for at in layers)] for layer in range(num_layers)) / num_layers
    assert mean == pytest.approx(target, abs=0.5)
    shares = [after / before for before, after in itertools.pairwise(counts)]
    assert max(shares) - min(shares) < 0.05


def test_a_site_begins_with_one_token_at_least():
    assert start_counts((1, 2, 3), 4, 36, 9.8) == (1, 1, 1)
