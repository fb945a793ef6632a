"""The kernels on an NVIDIA GPU. Not collected by itself: ``make test-gpu`` runs it where there is a GPU."""

import dataclasses
from pathlib import Path

import kernel_checks
import pytest
import torch
from kernel_inputs import DTYPES, AttentionCase

from edgeprune.operators.attention_score import attention_score
from edgeprune.plugins.build import build
from edgeprune.plugins.kernel_library import KernelError, KernelLibrary

OUTPUT = Path(__file__).parents[2] / "out" / "plugins-gpu"
ROWS = (0, 1, 31, 33, 640, 1024, 1025, 2880, 4096, 4500, 16384)

# Sizes of real models, compared with torch on the GPU.
MODEL_CASES = {
    "LLaVA-1.5-7B, all rows": AttentionCase(H=32, Hkv=32, Q=640, R=640, S=640, D=128),
    "LLaVA-1.5-7B, last row": AttentionCase(H=32, Hkv=32, Q=1, R=1, S=640, D=128),
    "LLaVA-1.5-7B, text rows": AttentionCase(H=32, Hkv=32, Q=640, R=64, S=640, D=128),
    "LLaVA-1.5-7B, logits": AttentionCase(H=32, Hkv=32, Q=640, R=640, S=640, D=128, G=2, mode="logits"),
    "LLaVA-NeXT-7B, text rows": AttentionCase(H=32, Hkv=32, Q=2944, R=64, S=2944, D=128),
    "Qwen2-VL-7B, all rows": AttentionCase(H=28, Hkv=4, Q=1024, R=1024, S=1024, D=128),
    "Qwen2-VL-7B, last row of many": AttentionCase(H=28, Hkv=4, Q=1, R=1, S=16384, D=128),
    "CLIP, class token": AttentionCase(B=4, H=16, Hkv=16, Q=1, R=1, S=577, D=64, causal=False),
    "CLIP, all rows": AttentionCase(B=2, H=16, Hkv=16, Q=577, R=577, S=577, D=64, causal=False),
}


@pytest.fixture(scope="session")
def kernels() -> KernelLibrary:
    """Compiled for the GPU that is there."""
    major, minor = torch.cuda.get_device_capability()
    return KernelLibrary(build(OUTPUT, architectures=(10 * major + minor,)).kernels, "cuda")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", kernel_checks.ATTENTION_CASES)
def test_attention_score(kernels, reference, name, dtype):
    case = dataclasses.replace(kernel_checks.ATTENTION_CASES[name], dtype=dtype)
    kernel_checks.check_attention(kernels, reference, case, seed=len(name))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", MODEL_CASES)
def test_attention_score_at_the_size_of_models(kernels, name, dtype):
    case = dataclasses.replace(MODEL_CASES[name], dtype=dtype)
    inputs = {
        key: None if tensor is None else tensor.cuda() for key, tensor in case.inputs(len(name)).items()
    }
    first, second = (kernels.attention_score(**inputs, **case.options()) for _ in range(2))
    assert torch.equal(first, second)
    rows, query = inputs.pop("query_rows"), inputs.pop("query")
    query = query if rows is None else query.index_select(2, rows)
    # The reference's products must be float32, too.
    torch.backends.cuda.matmul.allow_tf32 = False
    kernel_checks.assert_close(first, attention_score(query, **inputs, **case.options()))


@pytest.mark.parametrize("S", ROWS)
def test_top_k(kernels, reference, S):
    for seed in range(20):
        kernel_checks.check_top_k(kernels, reference, B=3, S=S, seed=seed)


@pytest.mark.parametrize("S", ROWS)
def test_threshold(kernels, reference, S):
    for seed in range(20):
        kernel_checks.check_threshold(kernels, reference, B=3, P=1 + seed % 3, S=S, seed=seed)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", kernel_checks.SOFT_NMS_CASES)
def test_soft_nms(kernels, reference, name, dtype):
    case = dataclasses.replace(kernel_checks.SOFT_NMS_CASES[name], dtype=dtype)
    kernel_checks.check_soft_nms(kernels, reference, case, seed=1)


@pytest.mark.parametrize("name", kernel_checks.DPP_CASES)
def test_dpp(kernels, reference, name):
    kernel_checks.check_dpp(kernels, reference, kernel_checks.DPP_CASES[name], seed=2)


@pytest.mark.parametrize("S", [1, 2, 40, 1025])
def test_dpp_of_ties(kernels, reference, S):
    for seed in range(6):
        kernel_checks.check_dpp_of_ties(kernels, reference, S, seed)


@pytest.mark.parametrize(("S", "K"), [(1, 1), (50, 0), (50, 70), (700, 300), (16384, 8000)])
def test_gather(kernels, reference, S, K):
    kernel_checks.check_gather(kernels, reference, S, K, seed=S)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_compaction(kernels, reference, dtype):
    kernel_checks.check_compaction(kernels, reference, dtype, seed=0)


def test_all_run_in_a_cuda_graph(kernels):
    """Nothing allocates, waits or depends on the host: a captured score-select-gather gives the same again."""
    case = AttentionCase(H=8, Hkv=8, Q=300, R=300, S=300, D=64, dtype="float16")
    inputs = {name: None if tensor is None else tensor.cuda() for name, tensor in case.inputs(0).items()}
    hidden = torch.randn(1, 300, 256, device="cuda", dtype=torch.float16)
    num_keep = torch.tensor([100], device="cuda")
    droppable = torch.ones(1, 300, dtype=torch.bool, device="cuda")

    def prune() -> torch.Tensor:
        score = kernels.attention_score(**inputs, **case.options())
        order, _ = kernels.select_top_k(score[:, 0].contiguous(), num_keep, droppable)
        return kernels.token_gather(order[0, :100].contiguous(), [hidden], [1])[0]

    expected = prune()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = prune()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(kept, expected)


def test_sizes_that_do_not_fit_are_refused(kernels):
    case = AttentionCase(D=257)
    inputs = {name: None if tensor is None else tensor.cuda() for name, tensor in case.inputs(0).items()}
    with pytest.raises(KernelError, match="not valid"):
        kernels.attention_score(**inputs, **case.options())
