"""What quantizing a bundle did and what it changed, as the manifest holds it."""

from dataclasses import dataclass

from edgeprune.errors import BundleError

INT8, INT4, FP8 = "int8", "int4", "fp8"
QUANTIZED_PRECISIONS = (INT8, INT4, FP8)
# Whose operators the quantized products are written in.
ONNXRUNTIME, TENSORRT = "onnxruntime", "tensorrt"
FORMS = (ONNXRUNTIME, TENSORRT)


@dataclass(frozen=True)
class QuantizedPartEntry:
    """The quantized products of the decoder, or of the vision tower and the projector.

    Attributes:
        precision: "int8", "int4" or "fp8".
        scheme: How: "dynamic" (weights beforehand, activations while running), "static" (activations, too, by
            calibrated ranges), or "weight-only".
        block_size: Weights along a column that share a scale; null where a whole column does.
        products: Matrix products whose weights are quantized.
        kept_products: Those that were left as they were because their result decides which tokens are kept.
        fp16_bytes: What the quantized weights would take in float16.
        bytes: What they take now, scales and zero points included.
    """

    precision: str
    scheme: str
    block_size: int | None
    products: int
    kept_products: int
    fp16_bytes: int
    bytes: int

    def __post_init__(self) -> None:
        if self.precision not in QUANTIZED_PRECISIONS or self.products < 1 or self.fp16_bytes < 1:
            raise BundleError(
                f"the manifest's quantization has an unusable part ({self.precision!r}, {self.products} products): "
                "quantize the bundle again"
            )


@dataclass(frozen=True)
class QuantizationReportEntry:
    """The quantized bundle beside the one that it was made from, on the calibration samples with ONNX Runtime.

    Attributes:
        backend: What ran both: "onnxruntime-cpu".
        bundle_bytes_before: Every file of the bundle that it was made from.
        bundle_bytes: Every file of the quantized one.
        answer_agreement: Share of samples with the same answer.
        kept_agreement: By site, and "vision" where the tower drops tokens: size of the intersection of the kept tokens
            by size of their union (Jaccard), averaged over the samples.
        vision_time_ratio: Time of the vision tower, quantized by unquantized; median over the samples, which both
            bundles answer in turns.
        prefill_time_ratio: The same of prefill.
        decode_time_ratio: The same of a generated token; null where no answer has two.
    """

    backend: str
    bundle_bytes_before: int
    bundle_bytes: int
    answer_agreement: float
    kept_agreement: dict[str, float]
    vision_time_ratio: float
    prefill_time_ratio: float
    decode_time_ratio: float | None

    def __post_init__(self) -> None:
        shares = (self.answer_agreement, *self.kept_agreement.values())
        if any(not 0 <= share <= 1 for share in shares):
            raise BundleError(
                "the manifest's quantization has an agreement outside of 0 … 1: quantize the bundle again"
            )


@dataclass(frozen=True)
class QuantizationEntry:
    """How a bundle was quantized.

    Attributes:
        edgeprune_version: Version that quantized.
        form: Whose operators it uses: "onnxruntime", or "tensorrt" (explicit QuantizeLinear and DequantizeLinear, which
            ONNX Runtime runs, too).
        decoder: The segments; null = not quantized.
        vision: Tower and projector; null = not quantized.
        data_sha256: Hash over prompt and pictures of every calibration sample, in their order.
        samples: How many.
        report: What it changed.
    """

    edgeprune_version: str
    form: str
    decoder: QuantizedPartEntry | None
    vision: QuantizedPartEntry | None
    data_sha256: str
    samples: int
    report: QuantizationReportEntry

    def __post_init__(self) -> None:
        if self.form not in FORMS or (self.decoder is None and self.vision is None) or self.samples < 1:
            raise BundleError(
                f"the manifest's quantization is of an unknown form {self.form!r} or quantizes nothing: "
                "quantize the bundle again"
            )

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of its parts, the decoder's first, each once."""
        parts = [part.precision for part in (self.decoder, self.vision) if part is not None]
        return tuple(dict.fromkeys(parts))
