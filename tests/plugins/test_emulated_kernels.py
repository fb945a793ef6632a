"""The kernels' own sources, executed on the host by ``emulator/emulated_device.h``, against the references."""

import ctypes
import dataclasses

import kernel_checks
import numpy as np
import pytest
import torch
from kernel_inputs import DTYPES, AttentionCase
from kernel_inputs import attention_in_float64 as exact_attention

from edgeprune.plugins.kernel_library import KernelError, _AttentionScoreProblem

# One worker builds the libraries and runs all tests of them.
pytestmark = pytest.mark.xdist_group("plugins")

# One slice of 32 rows per warp, four, sixteen; and sizes round their ends.
ROWS = (0, 1, 31, 33, 640, 1024, 1025, 4096, 4500)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", kernel_checks.ATTENTION_CASES)
def test_attention_score(emulated, reference, name, dtype):
    case = dataclasses.replace(kernel_checks.ATTENTION_CASES[name], dtype=dtype)
    kernel_checks.check_attention(emulated, reference, case, seed=len(name))


def test_a_tile_row_that_sees_no_key_adds_nothing(emulated):
    case = AttentionCase(H=1, Hkv=1, Q=40, R=40, S=40, D=16, dtype="float16")
    inputs = case.inputs(0)
    inputs["row_index"][::2] = -1
    score = emulated.attention_score(**inputs, **case.options())
    inputs["row_index"][::2] = 0
    inputs["row_weight"][:, ::2] = 0
    torch.testing.assert_close(
        score.double(), torch.from_numpy(exact_attention(case, inputs)), rtol=1e-5, atol=1e-7
    )


def test_nan_stays_where_its_row_sees(emulated):
    case = AttentionCase(H=1, Hkv=1, Q=70, R=70, S=70, D=16, dtype="float16")
    inputs = case.inputs(0)
    inputs["query"][0, 0, 3, 0] = torch.nan
    score = emulated.attention_score(**inputs, **case.options())[0, 0]
    assert score.isnan().nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_sizes_that_do_not_fit_are_refused(emulated):
    case = AttentionCase(D=257)
    with pytest.raises(KernelError, match="not valid"):
        emulated.attention_score(**case.inputs(0), **case.options())
    with pytest.raises(KernelError, match="too large"):
        emulated.select_top_k(
            torch.zeros(1, 16385), torch.tensor([1]), torch.ones(1, 16385, dtype=torch.bool)
        )
    with pytest.raises(KernelError, match="not valid"):
        emulated.token_gather(torch.tensor([0]), [torch.zeros(1)] * 9, [0] * 9)


@pytest.mark.parametrize("S", ROWS)
def test_top_k(emulated, reference, S):
    for seed in range(4):
        kernel_checks.check_top_k(emulated, reference, B=2, S=S, seed=seed)


@pytest.mark.parametrize("S", ROWS)
def test_threshold(emulated, reference, S):
    for seed in range(4):
        kernel_checks.check_threshold(emulated, reference, B=2, P=1 + seed % 3, S=S, seed=seed)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", kernel_checks.SOFT_NMS_CASES)
def test_soft_nms(emulated, reference, name, dtype):
    case = dataclasses.replace(kernel_checks.SOFT_NMS_CASES[name], dtype=dtype)
    kernel_checks.check_soft_nms(emulated, reference, case, seed=1)


@pytest.mark.parametrize("name", kernel_checks.DPP_CASES)
def test_dpp(emulated, reference, name):
    kernel_checks.check_dpp(emulated, reference, kernel_checks.DPP_CASES[name], seed=2)


@pytest.mark.parametrize("S", [1, 2, 40])
def test_dpp_of_ties(emulated, reference, S):
    for seed in range(4):
        kernel_checks.check_dpp_of_ties(emulated, reference, S, seed)


def test_the_workspace_bound_covers_every_smaller_problem(emulated):
    rng = np.random.default_rng(0)
    library = emulated._library
    for name in ("workspace", "workspace_bound"):
        getattr(library, f"edgeprune_attention_score_{name}").restype = ctypes.c_size_t

    def size(name, B, R, S, G, **more):
        problem = _AttentionScoreProblem(batch=B, query_length=R, rows=R, keys=S, groups=G, scale=1.0, **more)
        return getattr(library, f"edgeprune_attention_score_{name}")(ctypes.byref(problem))

    for _ in range(3000):
        key_heads = int(rng.choice([1, 2, 8, 32]))
        more = {
            "element_type": int(rng.integers(0, 3)),
            "mode": int(rng.integers(0, 2)),
            "key_heads": key_heads,
            "heads": key_heads * int(rng.choice([1, 4, 7])),
            "head_dim": int(rng.choice([64, 128, 256])),
        }
        greatest = [int(rng.integers(1, most)) for most in (3, 900, 5000, 4)]
        bound = size("workspace_bound", *greatest, **more)
        assert bound >= size("workspace", *greatest, **more) > 0
        for _ in range(5):
            smaller = [int(rng.integers(1, most + 1)) for most in greatest]
            assert bound >= size("workspace", *smaller, **more)


@pytest.mark.parametrize(("S", "K"), [(1, 1), (50, 0), (50, 70), (700, 300)])
def test_gather(emulated, reference, S, K):
    kernel_checks.check_gather(emulated, reference, S, K, seed=S)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_compaction(emulated, reference, dtype):
    kernel_checks.check_compaction(emulated, reference, dtype, seed=0)
