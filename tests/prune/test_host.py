"""The method that lets the host choose: its scores and its own choice against their definition, its parameters."""

import numpy as np
import pytest
import torch
from geometries import LLAVA_7B
from numpy_references import attention_logits, causal_softmax, highest
from site_inputs import kept_rows, random_site_inputs, site_of

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.models.llama import Cut
from edgeprune.prune.host import Host, HostSelector
from edgeprune.prune.method import RankingSelector
from edgeprune.prune.registry import method_from_parameters


def defined_scores(inputs, score):
    """Mean over heads of the attention that the rows pay which score, in float64."""
    query, key = (inputs[name][0].double().numpy() for name in (names.query(1), names.present_key(1)))
    attention = causal_softmax(attention_logits(query, key)).mean(axis=0)
    return attention[-1] if score == "last-row" else attention[inputs[names.TEXT_ROWS].numpy()].mean(axis=0)


@pytest.mark.parametrize("score", ["last-row", "text-rows"])
def test_scores_and_choice_equal_the_definition(llava_folder, score):
    stage = site_of(llava_folder, Host(layers=(2,), keep_ratio=0.2, score=score))
    compared = 0
    for seed in range(60):
        inputs = random_site_inputs(stage, seed)
        expected = defined_scores(inputs, score)
        with torch.no_grad():
            scores = stage(inputs)[names.SCORES].numpy()
        assert scores.dtype == np.float32
        assert np.abs(scores - expected).max() <= 2e-6, seed
        visual = np.flatnonzero(inputs[names.VISUAL_SLOTS].numpy() >= 0)
        count = int(inputs[names.NUM_KEEP])
        ranked = np.sort(expected[visual])[::-1]
        if count < len(visual) and 0 < ranked[count - 1] - ranked[count] < 1e-7:
            continue  # which of the two is higher is a matter of rounding
        compared += 1
        kept = [int(visual[index]) for index in highest(np.round(expected[visual], 9), count)]
        assert kept_rows(stage, inputs) == kept, seed
    assert compared > 45


def test_each_site_leaves_the_same_share_of_what_reaches_it():
    sites = Host(layers=(2, 8, 16), keep_ratio=0.5).decoder_sites(LLAVA_7B)
    assert [(site.cut, site.keep_per_image) for site in sites] == [
        (Cut(2), 288),
        (Cut(8), 144),
        (Cut(16), 72),
    ]


def test_the_preset_is_the_default():
    assert method_from_parameters("host", {"preset": "half"}) == Host()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"layers": []}, "'layers' is empty: give at least one layer"),
        ({"keep_ratio": 0.0}, "'keep_ratio' is 0.0, allowed: above 0, up to 1"),
        ({"score": "first-row"}, "'score' is 'first-row', allowed: last-row, text-rows"),
        ({"layer": 3}, "unknown parameter 'layer', known: layers, keep_ratio, score"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError, match="host: ") as caught:
        method_from_parameters("host", parameters)
    assert message in str(caught.value)


@pytest.mark.parametrize(("layers", "message"), [((0,), "allows layers 1 … 31"), ((3, 2), "out of order")])
def test_layers_are_checked(layers, message):
    with pytest.raises(PruningError, match=message):
        Host(layers=layers).check(LLAVA_7B)


def test_a_selector_that_gives_scores_does_not_rank(llava_folder, monkeypatch):
    class Both(HostSelector, RankingSelector):
        pass

    monkeypatch.setattr("edgeprune.prune.host.HostSelector", Both)
    with pytest.raises(PruningError, match="a selector that gives its scores neither merges nor ranks"):
        load_checkpoint(llava_folder, methods=[Host(layers=(2,))])
