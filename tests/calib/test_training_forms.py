"""With masks of 0 and 1, the training forms compute what the pruned reference computes, in every family."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_checkpoints import add_atp, add_dyrate

from edgeprune.calib.atp_trainer import ANNEALED, AtpTrainer
from edgeprune.calib.dyrate_trainer import DyRateTrainer
from edgeprune.calib.samples import choose_samples, read_samples
from edgeprune.calib.training_data import TrainingData
from edgeprune.checkpoint import load_checkpoint, read_config
from edgeprune.export.input_settings import InputSettings
from edgeprune.prune.dyrate_soft import DyRateTraining
from edgeprune.runtimes.preprocessing import read_picture


def reference(pruned, settings, example):
    prepared = settings.preprocessing.prepare(
        [read_picture(path) for path in example.pictures], pruned.plan.geometry.grid
    )
    return pruned.prefill(example.prompt, prepared)


def examples_of(folder, samples):
    settings = InputSettings.from_checkpoint(folder, read_config(folder))
    data = TrainingData(load_checkpoint(folder, methods=(), dtype=torch.float32), settings)
    data.add(choose_samples(read_samples(samples))[0], lambda _: None)
    return data, settings


@torch.no_grad()
def test_atp(family_folder, many_sizes):
    geometry = load_checkpoint(family_folder, methods=()).model.config.geometry
    add_atp(
        family_folder,
        [1, 2],
        num_patches=geometry.num_patches,
        theta_r=0.5,
        spread=0.4,
        self_norm="minmax",
        cross_norm="minmax",
    )
    pruned = load_checkpoint(family_folder, dtype=torch.float32)
    data, settings = examples_of(family_folder, many_sizes)
    training = replace(ANNEALED, target_tokens=0.8 * data.mean_visual)
    trainer = AtpTrainer(pruned.model, pruned.plan.methods[0], training, data.mean_visual)
    trainer.heads.load_state_dict(
        {name.removeprefix("atp.site"): tensor for name, tensor in pruned.weights.items()}
    )
    seen = set()
    for index, example in enumerate(data.examples):
        (inputs,) = trainer._inputs(data.batch([index]))
        prefill = trainer.soft(*inputs, math.inf)
        expected = reference(pruned, settings, example)
        slots = torch.from_numpy(example.layout.slots)
        for site, result in zip(prefill.sites, expected.sites, strict=True):
            assert sorted(slots[site.mask[0] > 0.5].tolist()) == list(result.slots)
            seen.add((result.tokens_in, result.kept))
        got = prefill.logits[0, len(example.prompt) - 1]
        assert (got - expected.logits).abs().max() < 2e-4
    assert any(0 < kept < entered for entered, kept in seen), "nothing would be compared"
    # Together they give what each gives alone.
    batch = data.batch(range(len(data.examples)))
    alone = [float(trainer.measure(data.batch([index])).tokens) for index in range(batch.size)]
    assert trainer.measure(batch).tokens.tolist() == pytest.approx(alone, abs=1e-3)


@torch.no_grad()
def test_dyrate(family_folder, many_sizes):
    geometry = load_checkpoint(family_folder, methods=()).model.config.geometry
    add_dyrate(family_folder, 1, heads=geometry.num_heads)
    pruned = load_checkpoint(family_folder, dtype=torch.float32)
    data, settings = examples_of(family_folder, many_sizes)
    method = pruned.plan.methods[0]
    trainer = DyRateTrainer(pruned.model, method, DyRateTraining(), data.mean_visual * 0.6, data.mean_visual)
    trainer.heads.load_state_dict(pruned.rate.decision.predictor.state_dict())
    for index, example in enumerate(data.examples):
        batch = data.batch([index])
        expected = reference(pruned, settings, example)
        answer = trainer.soft(
            batch.inputs_embeds,
            batch.visual_slots[0, : len(example.prompt)],
            tau=None,
            position_ids=batch.position_ids[0],
            deepstack=None if batch.deepstack is None else batch.deepstack[0],
        )
        assert round(float(answer.masks[0].sum())) == expected.sites[0].kept < expected.sites[0].tokens_in
        assert (answer.logits[len(example.prompt) - 1] - expected.logits).abs().max() < 2e-4
        share = float(answer.masks.mean())
        before = 1 / geometry.num_layers
        mean = example.num_visual * (before + (1 - before) * share)
        assert float(trainer.measure(batch).tokens) == pytest.approx(mean, abs=1e-3)
    assert np.ptp([example.num_visual for example in data.examples]) > 0
