"""Whether float16 weights stay what they are in a session of ONNX Runtime on the CPU.

Its CPU kernels multiply float32. Left alone, ONNX Runtime replaces every float16 weight by a float32 copy when it opens
a graph. Kept as float16, weights stay mapped from their file and each is widened, at every run, right before the
product that reads it: the same arithmetic in the memory of a few weights, at about twice the time of a generated token
(docs/performance.md).
"""

from typing import Any

from edgeprune.manifest import Manifest
from edgeprune.runtimes.engine_memory import available_bytes

# What float32 copies may take of the memory that is free; the rest is for caches, activations and other programs.
_SHARE = 0.8


def copies_fit(manifest: Manifest) -> bool:
    """Whether float32 copies of a bundle's float16 weights fit the memory that is free now."""
    if manifest.dtype != "float16":
        return True
    available = available_bytes()
    files = {entry.path: entry.bytes for graph in manifest.graphs.values() for entry in graph.data}
    return available is None or 2 * sum(files.values()) <= _SHARE * available


def keep_float16(ort: Any, options: Any) -> None:
    """Have a session on the CPU widen float16 weights while it runs, not when it opens.

    Args:
        ort: The module onnxruntime.
        options: Its SessionOptions, changed in place.
    """
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer"
    )
    # The default order widens most weights before the first product, and then holds them all at once.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
