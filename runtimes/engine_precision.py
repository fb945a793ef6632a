"""The precision of a bundle's engines. They are strongly typed: what the graphs say is what is computed."""

from dataclasses import dataclass

from edgeprune.errors import EngineError
from edgeprune.manifest import Manifest
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
    plain = PRECISION_OF_DTYPE[manifest.dtype]
    return BundlePrecision(plain, plain, plain)


def engine_precision(manifest: Manifest, target: Target, asked: str | None = None) -> str:
    """The precision of the engines that a bundle gives on a target.

    Args:
        manifest: Of the bundle.
        target: The device.
        asked: What the user wants; None takes the bundle as it is.

    Raises:
        TargetError: The target lacks a precision of the bundle; the message names what it has.
        EngineError: The bundle is of another precision than asked for.
    """
    own = bundle_precision(manifest)
    if asked is not None and asked != own.name:
        for dtype, precision in PRECISION_OF_DTYPE.items():
            if asked == precision:
                raise EngineError(
                    f"the bundle is {own.name} and engines are strongly typed: export with --dtype {dtype} for {asked} "
                    "engines"
                )
        raise EngineError(
            f"{asked} engines need a bundle quantized to {asked}, and this one is {own.name}: give such a bundle, or "
            "leave --precision away"
        )
    for precision in dict.fromkeys((own.decoder, own.vision, own.plain)):
        target.check_precision(precision)
    return own.name
