"""The reference of a float16 export, computed in float32."""

import pytest
import torch
from tiny_checkpoints import random_prompt

from edgeprune.checkpoint import load_checkpoint
from edgeprune.export.float32_arithmetic import float32_arithmetic
from edgeprune.export.parity import Prompt, StageCase, record_cases, reference_arithmetic
from edgeprune.pruned_model import PrunedModel
from edgeprune.runtimes.guide import GuideInputs


def load_half(folder, **options) -> PrunedModel:
    return load_checkpoint(folder, dtype=torch.float16, fused_rotary=True, **options)


def record(model: PrunedModel, guide: GuideInputs | None = None) -> dict[str, list[StageCase]]:
    prompts = []
    for count in (1, 2, 0):
        ids, pictures = random_prompt(num_images=count, seed=count)
        prompts.append(Prompt(f"{count} pictures", ids, pictures, guide if count else None))
    return record_cases(model, prompts)


def widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("folder", ["atp_folder", "sparsevlm_folder", "dyrate_folder", "combined_folder"])
def test_every_stage_gives_what_a_float32_model_of_the_same_weights_gives(request, folder):
    path = request.getfixturevalue(folder)
    half = load_half(path)
    with reference_arithmetic(half):
        cases = record(half)
    wide = load_half(path)
    for stage in wide.stages:
        stage.float()
    assert set(cases) == {stage.name for stage in wide.stages}
    for stage in wide.stages:
        rounded = {spec.name for spec in stage.outputs if spec.dtype == "model"}
        for case in cases[stage.name]:
            with torch.no_grad():
                expected = stage(widened(case.inputs))
            assert set(expected) == set(case.outputs)
            for name, value in case.outputs.items():
                wanted = expected[name].half() if name in rounded else expected[name]
                assert value.dtype == wanted.dtype
                assert torch.equal(value, wanted), (stage.name, name, case.description)


def test_float16_itself_gives_other_numbers(atp_folder):
    model = load_half(atp_folder)
    inputs = record(model)["segment0"][0].inputs
    segment = model.segments[0]
    with torch.no_grad():
        narrow = segment(inputs)
        with float32_arithmetic([segment]):
            wide = segment(inputs)
    assert any(not torch.equal(narrow[name], wide[name]) for name in narrow)


def test_weights_and_stages_are_left_as_they_were(atp_folder):
    model = load_half(atp_folder)
    before = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    with reference_arithmetic(model):
        record(model)
    assert {name: weight.data_ptr() for name, weight in model.model.named_parameters()} == before
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float16}
    assert not any(stage._forward_hooks or stage._forward_pre_hooks for stage in model.stages)
    half = torch.ones(2, dtype=torch.float16)
    assert (half + half).dtype == torch.float16


def test_float32_is_left_alone(atp_folder):
    model = load_checkpoint(atp_folder, dtype=torch.float32)
    with reference_arithmetic(model):
        assert not any(stage._forward_hooks or stage._forward_pre_hooks for stage in model.stages)
        half = torch.ones(2, dtype=torch.float16)
        assert (half + half).dtype == torch.float16
