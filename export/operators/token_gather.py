"""TokenGather as an ONNX node and as functions of standard operators, one per list of axes.

Torch reference: ``edgeprune.operators.token_gather``.
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from edgeprune.export.operators.function_body import FunctionBody
from edgeprune.export.operators.operator_node import emit
from edgeprune.operators.schema import TOKEN_GATHER


def translation(keep_indices: Any, tensors: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """The node of one ``edgeprune::token_gather`` call, for ``custom_translation_table``."""
    numbers = range(1, len(tensors) + 1)
    data = {f"data_{i}": tensor for i, tensor in zip(numbers, tensors, strict=True)}
    outputs = [f"gathered_{i}" for i in numbers]
    return list(emit(TOKEN_GATHER, {"keep_indices": keep_indices, **data}, outputs, {"axes": list(axes)}))


def specialisation(node: ir.Node) -> tuple[int, ...]:
    """The axes of a node, which its function body is written for; their number is that of the tensors."""
    return tuple(node.attributes["axes"].as_ints())


def precedence(*axes: int) -> tuple[int, ...]:
    """Most tensors first: each would be a launch of its own."""
    return (-len(axes), *axes)


def function(*axes: int, opset_version: int = 23) -> ir.Function:
    """The function body for tensors with these row axes.

    Shapes:
        keep_indices: [K] int64, data_i: S rows along axes[i-1]
        gathered_i: the same with K rows
    """
    numbers = range(1, len(axes) + 1)
    body = FunctionBody(
        TOKEN_GATHER, ["keep_indices", *(f"data_{i}" for i in numbers)], opset_version=opset_version
    )
    gathered = {
        f"gathered_{i}": body.op(
            "Gather", body.input(f"data_{i}"), body.input("keep_indices"), name=f"gathered_{i}", axis=axis
        )
        for i, axis in zip(numbers, axes, strict=True)
    }
    return body.function(gathered, {"axes": ir.AttributeType.INTS})
