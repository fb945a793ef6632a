"""TokenGather: the kept rows of several tensors.

Torch reference of the operator; the ONNX function is ``edgeprune.export.operators.token_gather``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.errors import PruningError
from edgeprune.operators.schema import MAX_GATHERED


def token_gather(keep_indices: Tensor, tensors: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
    """Select rows of each tensor along its own row axis.

    Shapes:
        keep_indices: [K] int64, values from 0 to S-1
        tensors: each with S rows along its axis, for example hidden_states [1, S, C] with axis 1
        returns: the same shapes with K rows in place of S

    Args:
        keep_indices: The rows to take, in this order.
        tensors: One to eight tensors of any type.
        axes: The row axis of each tensor, counted from 0.

    Raises:
        PruningError: There are too few or too many tensors, or not one valid axis for each.
    """
    if not 1 <= len(tensors) <= MAX_GATHERED or len(tensors) != len(axes):
        raise PruningError(
            f"token_gather takes 1 to {MAX_GATHERED} tensors and one axis each; got {len(tensors)} tensors "
            f"and {len(axes)} axes"
        )
    for tensor, axis in zip(tensors, axes, strict=True):
        if not 0 <= axis < tensor.dim():
            raise PruningError(f"axis {axis} is not an axis of a tensor of {tensor.dim()} dimensions")
    gathered: list[Tensor] = _token_gather(keep_indices, list(tensors), list(axes))
    return gathered


# The schema of a custom operator is read from these annotations, and knows list and not Sequence as a result.
@torch.library.custom_op("edgeprune::token_gather", mutates_args=())
def _token_gather(keep_indices: Tensor, tensors: list[Tensor], axes: list[int]) -> list[Tensor]:
    return [tensor.index_select(axis, keep_indices) for tensor, axis in zip(tensors, axes, strict=True)]


@_token_gather.register_fake
def _token_gather_fake(keep_indices: Tensor, tensors: list[Tensor], axes: list[int]) -> list[Tensor]:
    K = keep_indices.shape[0]
    return [
        tensor.new_empty((*tensor.shape[:axis], K, *tensor.shape[axis + 1 :]))
        for tensor, axis in zip(tensors, axes, strict=True)
    ]
