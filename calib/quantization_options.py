"""What to quantize, and for which runtime."""

from dataclasses import dataclass

from edgeprune.errors import QuantizationError
from edgeprune.manifest import Manifest
from edgeprune.quantization_entry import FORMS, FP8, INT4, INT8, ONNXRUNTIME, QUANTIZED_PRECISIONS, TENSORRT

BLOCK_SIZES = (32, 64, 128, 256)
# Fewer say nothing about ranges of activations or agreement of answers.
FEWEST_SAMPLES = 8
# ONNX has 4-bit integers and scales of blocks from here on.
_BLOCKS_OPSET = 21


@dataclass(frozen=True)
class QuantizationOptions:
    """What to quantize, and for which runtime.

    Attributes:
        decoder: Precision of the segments' products; None leaves them.
        vision: Precision of the products of tower and projector; None leaves them.
        form: "onnxruntime" or "tensorrt".
        block_size: INT4 weights along a column that share a scale.
        samples: How many samples to draw from the data; None takes all.
        seed: Of the draw.
        max_new_tokens: Most tokens to generate for a sample.
        threads: Threads of an operator while calibrating and comparing; None lets ONNX Runtime choose.
    """

    decoder: str | None = INT8
    vision: str | None = None
    form: str = ONNXRUNTIME
    block_size: int = 128
    samples: int | None = 32
    seed: int = 0
    max_new_tokens: int = 16
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise QuantizationError(f"form '{self.form}' is unknown, known: {', '.join(FORMS)}")
        if self.decoder is None and self.vision is None:
            raise QuantizationError(
                "nothing to quantize: give a precision for the decoder or the vision tower"
            )
        for part in (self.decoder, self.vision):
            if part is not None and part not in QUANTIZED_PRECISIONS:
                raise QuantizationError(
                    f"precision '{part}' is unknown, known: {', '.join(QUANTIZED_PRECISIONS)}"
                )
            if part == FP8 and self.form == ONNXRUNTIME:
                raise QuantizationError(
                    "ONNX Runtime computes no FP8 on the CPU: choose int8 or int4, or the form tensorrt"
                )
        if self.block_size not in BLOCK_SIZES:
            raise QuantizationError(
                f"blocks of {self.block_size} weights do not exist, allowed: {', '.join(map(str, BLOCK_SIZES))}"
            )
        if self.samples is not None and self.samples < FEWEST_SAMPLES:
            raise QuantizationError(
                f"{self.samples} samples are too few to calibrate: give {FEWEST_SAMPLES} or more"
            )
        if self.max_new_tokens < 1 or self.seed < 0 or (self.threads is not None and self.threads < 1):
            raise QuantizationError(
                "max_new_tokens and threads start at 1 and the seed at 0: give larger ones"
            )

    def check(self, manifest: Manifest) -> None:
        """Refuse a bundle that cannot be quantized like this.

        Raises:
            QuantizationError: It is quantized already, or its opset or dtype lacks what is needed.
        """
        if manifest.quantization is not None:
            raise QuantizationError("the bundle is quantized already: quantize the one that it was made from")
        parts = (self.decoder, self.vision)
        if self.form == TENSORRT and INT4 in parts and manifest.opset < _BLOCKS_OPSET:
            raise QuantizationError(
                f"ONNX has INT4 weights from opset {_BLOCKS_OPSET} on, the bundle has {manifest.opset}: "
                f"export with --opset {_BLOCKS_OPSET} or higher"
            )
        if self.form == ONNXRUNTIME and INT8 in parts and manifest.dtype != "float32":
            raise QuantizationError(
                f"ONNX Runtime quantizes float32 activations while running, the bundle is {manifest.dtype}: "
                "export with --dtype float32"
            )
