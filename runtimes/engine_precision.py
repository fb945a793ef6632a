"""The precision of a bundle's engines. They are strongly typed: what the graphs say is what is computed."""

from dataclasses import dataclass

from edgeprune.errors import EngineError
from edgeprune.manifest import Manifest
from edgeprune.quantization_entry import ONNXRUNTIME
from edgeprune.targets import Target

PRECISION_OF_DTYPE = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class BundlePrecision:
    """What a bundle's graphs compute in.

    Attributes:
        plain: Precision of everything that is not quantized, "fp32" or "fp16".
        decoder: Of the segments' matrix products.
        vision: Of the vision tower's.
    """

    plain: str
    decoder: str
    vision: str

    @property
    def name(self) -> str:
        """What ``--precision`` calls it: the decoder's, which has most of the weights, or else the tower's."""
        return self.decoder if self.decoder != self.plain else self.vision


def bundle_precision(manifest: Manifest) -> BundlePrecision:
    """The precision of a bundle's graphs."""
    plain, quantization = PRECISION_OF_DTYPE[manifest.dtype], manifest.quantization
    if quantization is None:
        return BundlePrecision(plain, plain, plain)
    decoder, vision = quantization.decoder, quantization.vision
    return BundlePrecision(
        plain,
        plain if decoder is None else decoder.precision,
        plain if vision is None else vision.precision,
    )


def engine_precision(manifest: Manifest, target: Target, asked: str | None = None) -> str:
    """The precision of the engines that a bundle gives on a target.

    Args:
        manifest: Of the bundle.
        target: The device.
        asked: What the user wants; None takes the bundle as it is.

    Raises:
        TargetError: The target lacks a precision of the bundle; the message names what it has.
        EngineError: The bundle is of another precision than asked for, or quantized for another runtime.
    """
    own, quantization = bundle_precision(manifest), manifest.quantization
    if quantization is not None and quantization.form == ONNXRUNTIME:
        raise EngineError(
            "the bundle is quantized with operators of ONNX Runtime, which TensorRT lacks: quantize the one that it "
            "was made from with --for tensorrt"
        )
    if asked is not None and asked != own.name:
        if quantization is not None and asked == own.plain:
            raise EngineError(
                f"the bundle is quantized to {own.name}: build the one that it was made from for {asked} engines"
            )
        for dtype, precision in PRECISION_OF_DTYPE.items():
            if asked == precision:
                raise EngineError(
                    f"the bundle is {own.name} and engines are strongly typed: export with --dtype {dtype} for {asked} "
                    "engines"
                )
        raise EngineError(
            f"{asked} engines need a bundle quantized to {asked}, and this one is {own.name}: make one with edgeprune "
            "quantize --for tensorrt, or leave --precision away"
        )
    for precision in dict.fromkeys((own.decoder, own.vision, own.plain)):
        target.check_precision(precision)
    return own.name
