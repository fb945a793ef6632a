"""Stable descending sort as ONNX's TopK, whose ties go to the lower index by specification.

torch's exporter has no translation of ``aten.sort.stable``.
"""

from typing import Any

from onnxscript import opset18 as op


def translation(x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """The nodes of one ``aten::sort.stable`` call, for ``custom_translation_table``."""
    if not stable:
        raise ValueError("aten.sort.stable is called with stable=False")
    length = op.Shape(x, start=dim, end=dim + 1 if dim != -1 else None)
    values, indices = op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)
    return values, indices
