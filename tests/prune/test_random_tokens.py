import numpy as np
import pytest
from geometries import LLAVA_7B
from tiny_checkpoints import TINY, random_prompt

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.random_tokens import RandomTokens


@pytest.mark.parametrize("keep", [1, 64, 576])
def test_slots_are_distinct_and_ascending(keep):
    slots = RandomTokens(keep=keep).slots(LLAVA_7B)
    assert len(slots) == keep == RandomTokens(keep=keep).tokens_per_tile(LLAVA_7B)
    assert list(slots) == sorted(set(slots))
    assert 0 <= slots[0] <= slots[-1] < 576


def test_seed_decides():
    first = RandomTokens(keep=64, seed=1).slots(LLAVA_7B)
    assert first == RandomTokens(keep=64, seed=1).slots(LLAVA_7B)
    assert first != RandomTokens(keep=64, seed=2).slots(LLAVA_7B)
    # PCG64's stream is frozen: an export of next year keeps the same tokens.
    assert RandomTokens(keep=5, seed=0).slots(LLAVA_7B) == (81, 85, 142, 253, 389)


def test_more_tokens_contain_fewer():
    few, many = (set(RandomTokens(keep=keep, seed=3).slots(LLAVA_7B)) for keep in (64, 128))
    assert few < many


def test_every_slot_has_its_chance():
    counts = np.zeros(576)
    for seed in range(400):
        counts[list(RandomTokens(keep=64, seed=seed).slots(LLAVA_7B))] += 1
    # 400 draws at 1/9: 44 ± 6.
    assert counts.min() > 14
    assert counts.max() < 80


def test_features_are_those_of_the_kept_patches(llava_folder):
    method = RandomTokens(keep=7, seed=5)
    pruned, full = load_checkpoint(llava_folder, methods=[method]), load_checkpoint(llava_folder)
    ids, pixels = random_prompt(num_images=2, tokens_per_image=7)
    full_ids, _ = random_prompt(num_images=2)
    record = pruned.prefill(ids, pixels, record=True).record[1][2]
    expected = full.prefill(full_ids, pixels, record=True).record[1][2]
    slots = list(method.slots(pruned.plan.geometry))
    both = slots + [TINY.num_patches + slot for slot in slots]
    assert record["image_slots"].tolist() == both
    difference = record["image_features"] - expected["image_features"][both]
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": -1}, "'keep' is -1, allowed: 1 or more"),
        ({"seed": -1}, "'seed' is -1, expected at least 0"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as error:
        RandomTokens(**parameters)
    assert message in str(error.value)


def test_more_tokens_than_there_are():
    with pytest.raises(PruningError, match="'keep' is 577, but a picture has 576 visual tokens"):
        RandomTokens(keep=577).check(LLAVA_7B)
