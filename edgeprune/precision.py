"""In which precisions a bundle computes, and what engines of it may be asked for."""

from edgeprune.errors import EngineError
from edgeprune.manifest import Manifest
from edgeprune.quantization_entry import ONNXRUNTIME
from edgeprune.targets import Target

_OF_DTYPE = {"float32": "fp32", "float16": "fp16"}


def precisions(manifest: Manifest) -> tuple[str, ...]:
    """Those of a bundle: its quantized parts', the decoder's first, then that of everything else."""
    quantized = () if manifest.quantization is None else manifest.quantization.precisions
    return (*quantized, _OF_DTYPE[manifest.dtype])


def engine_precision(manifest: Manifest, target: Target, asked: str | None) -> str:
    """What engines of a bundle are called: its quantized precisions joined by "+", or that of its dtype.

    Args:
        manifest: The bundle's.
        target: The device.
        asked: What the user wants, one of the bundle's; None takes what there is.

    Raises:
        TargetError: The device lacks a precision.
        EngineError: The bundle has another one, or is quantized for another runtime.
    """
    for precision in (*([] if asked is None else [asked]), *precisions(manifest)):
        target.check_precision(precision)
    own = precisions(manifest)
    quantized = own[:-1]
    if manifest.quantization is not None and manifest.quantization.form == ONNXRUNTIME:
        raise EngineError(
            "the bundle is quantized with operators of ONNX Runtime, which TensorRT lacks: "
            "quantize the one that it was made from with --for tensorrt"
        )
    if asked is not None and asked not in (quantized or own):
        label = "+".join(quantized or own)
        if asked not in _OF_DTYPE.values():
            remedy = f"{asked} engines need a bundle quantized to {asked}: edgeprune quantize --for tensorrt makes one"
        elif quantized:
            remedy = f"{asked} engines need the bundle that it was made from: build that one"
        else:
            dtype = next(dtype for dtype, precision in _OF_DTYPE.items() if precision == asked)
            remedy = f"engines are strongly typed: export with --dtype {dtype} for {asked} engines"
        raise EngineError(f"the bundle is {label}, and {remedy}")
    return "+".join(quantized or own)
