import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import PruningError
from edgeprune.operators.token_gather import token_gather


@st.composite
def gather_inputs(draw):
    S = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors, axes = [], []
    for _ in range(draw(st.integers(1, 8))):
        shape = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2))
        axis = draw(st.integers(0, len(shape)))
        shape.insert(axis, S)
        tensors.append(rng.integers(-100, 100, size=shape))
        axes.append(axis)
    keep = draw(st.lists(st.integers(0, S - 1), min_size=1, max_size=S))
    return keep, tensors, axes


def rows_by_hand(keep, tensor, axis):
    shape = list(tensor.shape)
    shape[axis] = len(keep)
    result = np.zeros(shape, dtype=tensor.dtype)
    for position in np.ndindex(*shape):
        source = list(position)
        source[axis] = keep[position[axis]]
        result[position] = tensor[tuple(source)]
    return result


@settings(max_examples=60, deadline=None)
@given(inputs=gather_inputs())
def test_equals_the_definition(inputs):
    keep, tensors, axes = inputs
    gathered = token_gather(torch.tensor(keep), [torch.tensor(tensor) for tensor in tensors], axes)
    assert len(gathered) == len(tensors)
    for result, tensor, axis in zip(gathered, tensors, axes, strict=True):
        np.testing.assert_array_equal(result.numpy(), rows_by_hand(keep, tensor, axis))


def test_types_are_kept():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool]
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes]
    gathered = token_gather(torch.tensor([2, 0]), tensors, [0] * len(tensors))
    assert [tensor.dtype for tensor in gathered] == dtypes


def test_no_rows_are_a_valid_selection():
    (gathered,) = token_gather(torch.tensor([], dtype=torch.int64), [torch.zeros(1, 4, 2)], [1])
    assert gathered.shape == (1, 0, 2)


@pytest.mark.parametrize(("count", "axes"), [(0, []), (9, [0] * 9), (2, [0])])
def test_the_number_of_tensors_and_axes_is_checked(count, axes):
    with pytest.raises(PruningError, match="1 to 8 tensors and one axis each"):
        token_gather(torch.tensor([0]), [torch.zeros(1)] * count, axes)


def test_an_axis_that_a_tensor_does_not_have_is_an_error():
    with pytest.raises(PruningError, match="axis 1 is not an axis"):
        token_gather(torch.tensor([0]), [torch.zeros(1)], [1])


def test_the_custom_operator_is_well_formed():
    tensors = [torch.rand(1, 4, 3), torch.arange(4)]
    torch.library.opcheck(
        torch.ops.edgeprune.token_gather.default,
        (torch.tensor([1, 3]), tensors, [1, 0]),
        test_utils=("test_schema", "test_faketensor"),
    )
