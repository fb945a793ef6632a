"""DyRate against its definition in NumPy, its training form against its inference form, and its parameters."""

import numpy as np
import pytest
import torch
from numpy_references import attention_logits, causal_softmax
from site_inputs import random_site_inputs
from tiny_checkpoints import random_prompt

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.dyrate import DyRate, attention_shares, token_kinds
from edgeprune.prune.dyrate_soft import SoftDyRate, budget_loss, choose_rates, rate_masks
from edgeprune.prune.registry import method_from_parameters
from edgeprune.prune.vtw import Vtw


def test_site_equals_the_definition(dyrate_folder):
    stage = load_checkpoint(dyrate_folder).selects[0]
    generator = torch.Generator().manual_seed(0)
    linear = stage.selector.predictor.linear
    with torch.no_grad():
        # Any rate may win.
        linear.weight.copy_(3 * torch.randn(linear.weight.shape, generator=generator))
        linear.bias.zero_()
    weight, rates, compared = linear.weight.detach().double().numpy(), set(), 0
    for seed in range(90):
        inputs = random_site_inputs(stage, seed)
        query, key = (inputs[name][0].double().numpy() for name in (names.query(1), names.present_key(1)))
        slots = inputs[names.VISUAL_SLOTS].numpy()
        attention = causal_softmax(attention_logits(query, key))[:, -1]
        visual = np.flatnonzero(slots >= 0)
        system = np.arange(len(slots)) < visual[0]
        kinds = [system, slots >= 0, ~system & (slots < 0), np.zeros(len(slots), dtype=bool)]
        shares = np.stack([attention[:, kind].sum(axis=1) for kind in kinds], axis=1)
        logits = weight @ shares.ravel()
        rate = int(logits.argmax())
        ranked = sorted(visual, key=lambda row: (-attention.mean(axis=0)[row], row))
        left = len(visual) - int(len(visual) * rate / 8)
        scores = attention.mean(axis=0)[ranked]
        gap = scores[left - 1] - scores[left] if left < len(ranked) else 1.0
        if np.sort(logits)[-1] - np.sort(logits)[-2] < 1e-5 or 0 < gap < 1e-7:
            continue
        compared += 1
        rates.add(rate)
        with torch.no_grad():
            outputs = stage(inputs)
        rows = outputs[names.KEEP_INDICES][: int(outputs[names.KEEP_COUNT])].tolist()
        assert [row for row in rows if slots[row] >= 0] == sorted(ranked[:left]), seed
        ranks = outputs[names.VISUAL_RANKS].numpy()
        assert (ranks[slots < 0] == -1).all()
        assert set(np.flatnonzero((ranks >= 0) & (ranks < left))) == set(ranked[:left])
    assert compared > 70
    assert len(rates) >= 4


def test_shares():
    slots = torch.tensor([-1, -1, 0, 3, -1, 40, -1])
    kinds = token_kinds(slots)
    assert kinds.argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 1, 2]
    attention = torch.arange(1.0, 19).view(2, 9)
    attention = attention / attention.sum(dim=1, keepdim=True)
    shares = attention_shares(attention, kinds)
    expected = [[3, 13, 12, 17], [21, 40, 30, 35]]
    totals = torch.tensor([[45.0], [126.0]])
    assert torch.allclose(shares * totals, torch.tensor(expected).float(), atol=1e-4)


def test_masks_are_nested_and_remove_the_rates_share():
    masks = rate_masks(torch.tensor([3, 0, 2, 1, 4]), 10)
    assert masks.sum(dim=1).tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
    assert (masks[1:] <= masks[:-1]).all()
    assert masks[8].tolist() == [0, 1, 0, 0, 0]


def test_drawn_rates_follow_their_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    drawn = choose_rates(logits, 1.0, torch.Generator().manual_seed(0)).detach()
    assert torch.allclose(drawn.sum(dim=1), torch.ones(20000))
    assert torch.allclose(drawn.mean(dim=0), logits[0].softmax(dim=0), atol=0.02)


def test_training_form_equals_inference(dyrate_folder):
    """With the most likely rates, a sequence under masks has the logits of one whose tokens are dropped."""
    model = load_checkpoint(dyrate_folder)
    method = model.plan.methods[0]
    soft = SoftDyRate(model.model, method)
    soft.predictor.load_state_dict(model.rate.decision.predictor.state_dict())
    ids, pixels = random_prompt(num_images=1)
    answer = [17, 230, 41, 8, 99, 63, 120, 5]
    prefill = model.prefill(ids, pixels, record=True)
    logits = [prefill.logits]
    for step, token in enumerate(answer):
        logits.append(
            model.decode(token, prefill.next_position + step, prefill.caches, eviction=prefill.eviction)
        )
    assert prefill.eviction.state.events, "nothing would be compared"
    (embedded,) = [outputs for stage, _, outputs in prefill.record if stage.name == "embed"]
    words = model.model.language_model.embed_tokens(torch.tensor([answer]))
    with torch.no_grad():
        trained = soft(
            torch.cat((embedded[names.INPUTS_EMBEDS], words), dim=1), embedded[names.VISUAL_SLOTS], tau=None
        )
    assert (torch.stack(logits) - trained.logits[len(ids) - 1 :]).abs().max() < 1e-3
    left = {0: prefill.sites[0].kept} | dict(prefill.eviction.state.events)
    counts = trained.masks.sum(dim=1).tolist()
    assert all(counts[generated] == pytest.approx(now) for generated, now in left.items())


def test_the_classifier_learns_and_the_model_does_not(dyrate_folder):
    model = load_checkpoint(dyrate_folder)
    soft = SoftDyRate(model.model, model.plan.methods[0])
    assert set(dict(soft.named_parameters())) == {"predictor.linear.weight", "predictor.linear.bias"}
    ids, pixels = random_prompt(num_images=1)
    record = model.prefill(ids, pixels, record=True).record
    (embedded,) = [outputs for stage, _, outputs in record if stage.name == "embed"]
    inputs, slots = embedded[names.INPUTS_EMBEDS], embedded[names.VISUAL_SLOTS]
    result = soft(inputs, slots, generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(result.logits[:-1], torch.tensor(ids[1:])).backward()
    assert soft.predictor.linear.weight.grad.abs().sum() > 0

    optimizer = torch.optim.Adam(soft.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(budget_loss(soft(inputs, slots, generator=generator).masks, 0.25))
        optimizer.step()
    with torch.no_grad():
        kept = torch.stack([soft(inputs, slots, generator=generator).masks.mean() for _ in range(20)]).mean()
    assert abs(float(kept) - 0.25) < 0.12
    assert set(soft.weights()) == {"dyrate.predictor.weight", "dyrate.predictor.bias"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"num_rates": 1}, "'num_rates' is 1, allowed: 2 or more"),
        ({"rate": 0.5}, "unknown parameter 'rate', known: layer, num_rates"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(PruningError) as caught:
        method_from_parameters("dyrate", parameters)
    assert message in str(caught.value)


def test_it_must_be_the_last_site(dyrate_folder):
    method = DyRate(layer=2, num_rates=8)
    with pytest.raises(PruningError, match="must be the last site: 'vtw' lies behind it"):
        load_checkpoint(dyrate_folder, methods=[method, Vtw(layer=3)])
