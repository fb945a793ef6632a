import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoints import IMAGE_TOKEN_ID, TINY, add_atp, build_llava, random_prompt

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.atp import Atp, normalise_scores
from edgeprune.prune.atp_soft import (
    AtpTraining,
    SoftPrefill,
    SoftPrunedDecoder,
    SoftSite,
    VisualRows,
    atp_loss,
    masked_softmax,
    soft_attention,
    soft_normalise,
)
from edgeprune.pruned_model import PrunedModel
from edgeprune.pruning_plan import PruningPlan

SHARP = 1e6
ANSWER = [11, 12, 13]


# --- helpers ------------------------------------------------------------------------------------------------


def soft_form(pruned, **options):
    """The training form of a pruned model, with the same heads."""
    method = pruned.plan.methods[0]
    soft = SoftPrunedDecoder(pruned.model, method, AtpTraining(**options))
    soft.heads.load_state_dict(
        {name.removeprefix("atp.site"): tensor for name, tensor in pruned.weights.items()}
    )
    return soft


@torch.no_grad()
def batch_of(pruned, prompts, *, answer=()):
    """Embedded prompts with an answer behind them, padded on the right with a token that would show."""
    lengths = [len(ids) for ids, _ in prompts]
    padded = torch.full((len(prompts), max(lengths) + len(answer)), 17)
    pixels = torch.from_numpy(np.concatenate([pictures.pixel_values for _, pictures in prompts]))
    features = pruned.model.project(pruned.model.encode({"pixel_values": pixels}).features)
    for row, (ids, _) in enumerate(prompts):
        padded[row, : len(ids) + len(answer)] = torch.tensor([*ids.tolist(), *answer])
    embedded = pruned.model.language_model.embed_tokens(padded)
    visual = padded == IMAGE_TOKEN_ID
    embedded[visual] = features.flatten(0, 1)
    rows = VisualRows.of_one_picture(visual.int().argmax(dim=1), pruned.plan.geometry.grid, padded.shape[1])
    return embedded, rows, torch.tensor(lengths)


def prompts_of_many_lengths(spec=TINY, count=6):
    return [
        random_prompt(spec, prefix=3 + seed % 3, suffix=2 + 3 * (seed % 4), seed=seed)
        for seed in range(count)
    ]


def site_of(mask):
    mask = torch.tensor(mask)
    return SoftSite(mask, mask[:, 0], mask[:, 0])


@pytest.fixture
def pruned(atp_folder):
    return load_checkpoint(atp_folder, dtype=torch.float32)


# --- the same as inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (TINY, {}),
        (
            TINY,
            {"self_norm": "minmax", "cross_norm": "minmax", "theta_r": 0.5, "theta_s": 0.95, "spread": 0.4},
        ),
        (replace(TINY, layers=6, kv_heads=4), {"self_norm": "sigmoid", "theta_r": 0.3, "spread": 0.8}),
        (TINY, {"self_weight": 0.2, "self_norm": "minmax", "cross_norm": "minmax", "theta_r": 0.3}),
        (replace(TINY, layers=5, kv_heads=1, std=0.4), {"theta_r": 0.3, "strides": [2]}),
        (replace(TINY, image_size=16), {"theta_r": 0.9999, "theta_s": 0.9999, "spread": 0.0}),
    ],
    ids=["as written", "minmax", "sigmoid", "mostly S_cross", "one key head", "nothing passes"],
)
@pytest.mark.parametrize(("temperature", "drop_below"), [(SHARP, 0.0), (math.inf, 0.0), (math.inf, 1e-6)])
def test_sharp_masks_keep_what_inference_keeps(tmp_path, spec, parameters, temperature, drop_below):
    folder = add_atp(
        build_llava(tmp_path / "llava", spec),
        [1, 2, spec.layers - 1],
        num_patches=spec.num_patches,
        **parameters,
    )
    pruned = load_checkpoint(folder, dtype=torch.float32)
    prompts = prompts_of_many_lengths(spec)
    with torch.no_grad():
        soft = soft_form(pruned, drop_below=drop_below)
        prefill = soft(*batch_of(pruned, prompts, answer=ANSWER), temperature)
    counts = set()
    for row, (ids, pixels) in enumerate(prompts):
        hard = pruned.prefill(ids, pixels)
        for site, result in zip(prefill.sites, hard.sites, strict=True):
            assert (site.mask[row] > 0.5).nonzero().flatten().tolist() == list(result.slots)
        assert torch.allclose(prefill.logits[row, len(ids) - 1], hard.logits, atol=1e-4)
        kept = [result.kept for result in hard.sites]
        layers = pruned.plan.methods[0].layers
        expected = [([spec.num_patches, *kept])[sum(i >= at for at in layers)] for i in range(spec.layers)]
        assert prefill.counts[row].tolist() == pytest.approx(expected, abs=1e-3)
        counts.update(kept)
    assert len(counts) > 2 or parameters.get("theta_r") == 0.9999, "the prompts would not tell sites apart"


def test_answers_and_padding_change_nothing_before_them(pruned):
    prompts = prompts_of_many_lengths(count=4)
    soft = soft_form(pruned)
    with torch.no_grad():
        alone = [soft(*batch_of(pruned, [prompt]), 20.0) for prompt in prompts]
        together = soft(*batch_of(pruned, prompts, answer=ANSWER), 20.0)
    for row, single in enumerate(alone):
        length = single.logits.shape[1]
        assert torch.allclose(together.logits[row, :length], single.logits[0], atol=1e-4)
        for site, own in zip(together.sites, single.sites, strict=True):
            assert torch.allclose(site.mask[row], own.mask[0], atol=1e-4)


def test_leaving_out_what_nobody_sees_changes_nothing(pruned):
    inputs = batch_of(pruned, prompts_of_many_lengths(), answer=ANSWER)
    results = []
    for drop_below in (0.0, 1e-6):
        soft = soft_form(pruned, drop_below=drop_below)
        prefill = soft(*inputs, 300.0)
        prefill.logits[:, -1].square().mean().backward()
        gradient = torch.cat([heads.head_r.bias.grad for heads in soft.heads])
        results.append((prefill.logits[:, -1], prefill.counts, gradient))
    for whole, short in zip(*results, strict=True):
        assert torch.allclose(whole, short, rtol=1e-3, atol=1e-4)


def test_thresholds_below_all_scores_leave_the_unpruned_model(pruned):
    method = Atp(layers=(1, 2, 3), hidden_width=2, self_norm="sigmoid")
    soft = SoftPrunedDecoder(pruned.model, method, AtpTraining(theta_r=1e-6))
    ids, pixels = random_prompt(seed=3)
    with torch.no_grad():
        prefill = soft(*batch_of(pruned, [(ids, pixels)]), SHARP)
    unpruned = PrunedModel(pruned.model, PruningPlan((), pruned.plan.geometry), {})
    assert torch.allclose(prefill.logits[0, -1], unpruned.prefill(ids, pixels).logits, atol=1e-4)
    assert prefill.counts.flatten().tolist() == [TINY.num_patches] * TINY.layers


# --- parts --------------------------------------------------------------------------------------------------


def test_masked_softmax_equals_the_sum_over_entries():
    rng = np.random.default_rng(0)
    logits = 4 * rng.standard_normal((2, 3, 5, 5))
    gate = rng.random((2, 1, 5, 5)) * (rng.random((2, 1, 5, 5)) < 0.7)
    gate[:, :, range(5), range(5)] = 1
    visible = np.tril(np.ones((5, 5), dtype=bool))[None, None]
    got = masked_softmax(*map(torch.tensor, (logits, gate, visible))).numpy()
    for b, h, i in np.ndindex(2, 3, 5):
        weights = [math.exp(logits[b, h, i, j]) * gate[b, 0, i, j] for j in range(i + 1)]
        expected = [w / sum(weights) for w in weights] + [0] * (4 - i)
        assert got[b, h, i] == pytest.approx(expected, abs=2e-6)


def test_masked_softmax_forgets_pruned_entries_however_large():
    logits = torch.tensor([[[[200.0, 1.0, 0.0]]]], requires_grad=True)
    gate = torch.tensor([[[[0.0, 1.0, 1.0]]]], requires_grad=True)
    got = masked_softmax(logits, gate, torch.ones(1, 1, 1, 3, dtype=torch.bool))
    assert got.flatten().tolist() == pytest.approx([0, 0.731058, 0.268941], abs=2e-6)
    got[..., 1].sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(gate.grad).all()


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_a_pruned_row_sees_itself_and_is_seen_by_nobody(num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 6, 8, generator=generator)
    key, value = (torch.randn(1, num_kv_heads, 6, 8, generator=generator) for _ in range(2))
    gate = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    got = soft_attention(gate)(query, key, value, causal)
    visible = causal & (gate.bool() | torch.eye(6, dtype=torch.bool))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=True
    )
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "sigmoid", "minmax"])
def test_norms_are_those_of_inference(norm):
    generator = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn(4, 9, generator=generator)
    alive = (torch.rand(4, 9, generator=generator) < 0.6).float()
    alive[3] = torch.eye(9)[2]
    got = soft_normalise(scores, alive, norm) * alive
    for row in range(4):
        expected = normalise_scores(scores[row], alive[row].bool()[None], norm)
        assert torch.allclose(got[row], expected, atol=1e-6)


def test_loss_equals_the_sum_by_hand():
    method = Atp(layers=(1, 3), hidden_width=2)
    training = AtpTraining(lambda_atp=0.1, lambda_target=0.2, target_tokens=1.5)
    sites = (site_of([[1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]), site_of([[1.0, 0.0, 0.0, 0.0]] * 2))
    counts = torch.tensor([[4.0, 2.0, 2.0, 1.0], [4.0, 4.0, 4.0, 1.0]])
    loss = atp_loss(SoftPrefill(counts, sites, counts), method, training)
    # L_ATP = (2 + 4)/2/4·1 + 1/4·3 = 1.5; N̄ = 22/8.
    assert float(loss) == pytest.approx(0.1 * 1.5 + 0.2 * (22 / 8 - 1.5))


# --- training -----------------------------------------------------------------------------------------------


def test_the_gradient_reaches_the_heads_and_nothing_else(pruned):
    soft = soft_form(pruned, target_tokens=5.0)
    inputs = batch_of(pruned, prompts_of_many_lengths(count=3), answer=ANSWER)
    prefill = soft(*inputs, 10.0)
    loss = prefill.logits[:, -1].square().mean() + atp_loss(prefill, soft.method, soft.options)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in soft.named_parameters()}
    assert len(gradients) == 18
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(parameter.grad is None for parameter in pruned.model.parameters())


def test_answers_alone_move_the_thresholds(pruned):
    # Without the penalties every bit of gradient comes through the masked softmax.
    soft = soft_form(pruned)
    inputs = batch_of(pruned, prompts_of_many_lengths(count=3), answer=ANSWER)
    soft(*inputs, 10.0).logits[:, -1].square().mean().backward()
    assert all(heads.head_r.bias.grad.abs() > 0 for heads in soft.heads)


def test_training_meets_a_budget(pruned):
    training = AtpTraining(
        temperature_start=10,
        temperature_end=1e3,
        lambda_atp=0,
        target_tokens=14,
        learning_rate=0.02,
        theta_r=0.3,
    )
    soft = SoftPrunedDecoder(pruned.model, pruned.plan.methods[0], training)
    inputs = batch_of(pruned, prompts_of_many_lengths(count=8))
    optimizer = torch.optim.AdamW(soft.parameters(), weight_decay=0)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step / 60)
        prefill = soft(*inputs, training.temperature(step / 60))
        optimizer.zero_grad()
        atp_loss(prefill, soft.method, training).backward()
        optimizer.step()
    with torch.no_grad():
        assert soft(*inputs, math.inf).counts.mean() == pytest.approx(14, abs=2)


def test_weights_are_named_as_the_file_names_them(pruned):
    weights = soft_form(pruned).weights()
    assert weights.keys() == pruned.plan.weight_shapes().keys()
    assert all(torch.equal(tensor, pruned.weights[name]) for name, tensor in weights.items())


# --- options ------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    training = AtpTraining()
    assert training.temperature(0) == training.temperature(1) == 1e6
    assert (training.lambda_target, training.target_tokens, training.learning_rate) == (0.2, 130, 1e-4)


def test_the_temperature_anneals_geometrically():
    training = AtpTraining(temperature_start=10, temperature_end=1000)
    assert [training.temperature(p) for p in (0, 0.5, 1)] == pytest.approx([10, 100, 1000])


def test_the_learning_rate_rises_and_falls():
    training = AtpTraining(learning_rate=0.01, warmup=0.1)
    assert [training.learning_rate_at(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx(
        [0, 0.005, 0.01, 0.005, 0]
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature_start", 0.0),
        ("temperature_end", math.inf),
        ("lambda_atp", -0.1),
        ("lambda_target", math.nan),
        ("target_tokens", 0.0),
        ("learning_rate", 0.0),
        ("warmup", 1.0),
        ("theta_r", 0.0),
        ("theta_s", 1.0),
    ],
)
def test_an_impossible_option_is_refused(option, value):
    with pytest.raises(PruningError, match=option):
        AtpTraining(**{option: value})


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan])
def test_a_weight_of_s_self_outside_0_to_1_is_refused(weight):
    with pytest.raises(PruningError, match="'self_weight' is"):
        Atp(self_weight=weight)
