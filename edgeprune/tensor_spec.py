"""What a stage says of the tensors that it takes and gives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with symbolic dimensions.

    Attributes:
        name: See :mod:`edgeprune.tensor_names`.
        dtype: "int64", "float32", or "model" (the dtype of the weights).
        shape: Sizes, or names of dynamic dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
