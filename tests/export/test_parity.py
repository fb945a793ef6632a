"""The comparison of a graph with the torch reference."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeprune import tensor_names as names
from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import ParityError
from edgeprune.export.parity import StageCase, check_graph


@pytest.fixture
def embed_case(tied_folder) -> StageCase:
    model = load_checkpoint(tied_folder, dtype=torch.float32)
    inputs = {
        names.INPUT_IDS: torch.tensor([[5, 3, 3, 9]]),
        names.IMAGE_FEATURES: torch.randn(2, 32, generator=torch.Generator().manual_seed(0)),
        names.IMAGE_SLOTS: torch.tensor([4, 6]),
    }
    return StageCase("a test", inputs, model.embed(inputs))


def test_graph_that_agrees(unpruned_bundle, embed_case):
    parity = check_graph(unpruned_bundle / "embed.onnx", [embed_case], torch.float32)
    assert (parity.cases, parity.indices_identical, parity.max_abs_diff) == (1, True, 0.0)
    assert check_graph(unpruned_bundle / "embed.onnx", [], torch.float32).indices_identical is None


@pytest.mark.parametrize(
    ("output", "change", "message"),
    [
        (
            names.INPUTS_EMBEDS,
            lambda t: t + 1e-2,
            r"output inputs_embeds, a test: differs from torch by 1\.00e-02",
        ),
        (names.INPUTS_EMBEDS, lambda t: t * torch.nan, "differs from torch by nan"),
        (names.INPUTS_EMBEDS, lambda t: t[:, :-1], r"shape \[1, 4, 32\], torch has \[1, 3, 32\]"),
        (names.VISUAL_SLOTS, lambda t: t + torch.tensor([0, 0, 1, 0]), "1 of 4 indices differ from torch"),
        (names.VISUAL_SLOTS, lambda t: t[:3], r"shape \[4\], torch has \[3\]"),
    ],
)
def test_graph_that_disagrees(unpruned_bundle, embed_case, output, change, message):
    wrong = replace(embed_case, outputs=embed_case.outputs | {output: change(embed_case.outputs[output])})
    with pytest.raises(ParityError, match=message):
        check_graph(unpruned_bundle / "embed.onnx", [embed_case, wrong], torch.float32)


def test_changed_weight_is_found(unpruned_bundle, embed_case, tmp_path):
    shutil.copytree(unpruned_bundle, tmp_path / "bundle")
    table = np.memmap(tmp_path / "bundle" / "embed.onnx.data", np.float32, "r+")
    table[5 * 32] += 0.01  # token 5 is in the case
    table.flush()
    with pytest.raises(ParityError, match=r"embed\.onnx, output inputs_embeds.* by 1\.00e-02"):
        check_graph(tmp_path / "bundle" / "embed.onnx", [embed_case], torch.float32)


def test_half_precision_is_compared_relative_to_the_magnitude(unpruned_bundle, embed_case):
    big = embed_case.outputs[names.INPUTS_EMBEDS] + 0.015
    wrong = replace(embed_case, outputs=embed_case.outputs | {names.INPUTS_EMBEDS: big})
    assert check_graph(unpruned_bundle / "embed.onnx", [wrong], torch.float16).max_abs_diff > 0.01
    with pytest.raises(ParityError):
        check_graph(unpruned_bundle / "embed.onnx", [wrong], torch.float32)


def test_graph_that_cannot_be_opened(tmp_path, embed_case):
    (tmp_path / "embed.onnx").write_bytes(b"no graph")
    with pytest.raises(ParityError, match=r"ONNX Runtime .* cannot open embed\.onnx"):
        check_graph(tmp_path / "embed.onnx", [embed_case], torch.float32)
