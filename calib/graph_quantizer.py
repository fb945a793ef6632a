"""One graph quantized, by ONNX Runtime's quantizer where it has the form."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune.calib.float8 import quantize_to_float8
from edgeprune.calib.quantization_options import BLOCK_SIZES, QuantizationOptions
from edgeprune.calib.recorded_inputs import RecordedInputs
from edgeprune.calib.weight_products import deciding_products, gemms_as_products, weight_products
from edgeprune.errors import QuantizationError
from edgeprune.quantization_entry import INT4, INT8, ONNXRUNTIME

DYNAMIC, STATIC, WEIGHT_ONLY = "dynamic", "static", "weight-only"
# Of MatMulNBits: activations are quantized to INT8 while running, which is what makes it fast on a CPU.
_INT8_ACTIVATIONS = 4
_SCALE_BYTES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class QuantizedGraph:
    """A quantized graph.

    Attributes:
        model: The graph, weights included.
        products: Products whose weights are quantized.
        kept_products: Those that were left because they decide what is kept.
        fp16_bytes: What the quantized weights would take in float16.
        bytes: What they take, scales and zero points included.
    """

    model: Any
    products: int
    kept_products: int
    fp16_bytes: int
    bytes: int


def scheme_of(precision: str, form: str) -> str:
    """Which of the schemes a precision has in a form."""
    if precision == INT4:
        return WEIGHT_ONLY
    return DYNAMIC if form == ONNXRUNTIME else STATIC


def needs_inputs(precision: str, options: QuantizationOptions) -> bool:
    """Whether quantizing reads recorded inputs."""
    return scheme_of(precision, options.form) == STATIC


def quantize_graph(
    path: Path,
    precision: str,
    options: QuantizationOptions,
    read: Collection[str],
    inputs: RecordedInputs | None,
    scratch: Path,
) -> QuantizedGraph:
    """Quantize the weights of a graph's matrix products.

    Args:
        path: The graph.
        precision: "int8", "int4" or "fp8".
        options: Form and block size.
        read: Outputs that graphs which choose tokens read.
        inputs: What the graph was given on the calibration samples, where :func:`needs_inputs` says so.
        scratch: An empty folder for what ONNX Runtime's quantizer reads from files.

    Raises:
        QuantizationError: Weights, scales or ranges are not finite, nothing can be quantized, or ONNX Runtime fails.
    """
    model = onnx.load(str(path))
    gemms_as_products(model)
    weights = {node.name: weight for node, weight in weight_products(model)}
    for name, weight in weights.items():
        if not np.isfinite(numpy_helper.to_array(weight)).all():
            raise QuantizationError(
                f"{path.name}: the weights of {name} hold NaN or infinity, and so would their scales: "
                "export a whole checkpoint"
            )
    kept = deciding_products(model, read) & set(weights)
    blocks = {
        name: _block(int(weight.dims[0]), options, pad=options.form == ONNXRUNTIME)
        for name, weight in weights.items()
    }
    chosen = [
        name for name in weights if name not in kept and (precision != INT4 or blocks[name] is not None)
    ]
    if not chosen:
        raise QuantizationError(
            f"{path.name} has no weights that can be quantized to {precision}: leave it as it is"
        )
    before = {tensor.name for tensor in model.graph.initializer}
    fp16_bytes = 2 * sum(int(np.prod(weights[name].dims)) for name in chosen)
    with _own_errors(path.name):
        if precision == INT4:
            by_block: dict[int, list[str]] = {}
            for name in chosen:
                by_block.setdefault(blocks[name] or 0, []).append(name)
            for block, names in by_block.items():
                model = _weight_only(model, names, block, options)
        elif options.form == ONNXRUNTIME:
            model = _dynamic(model, chosen, scratch)
        elif precision == INT8:
            model = _static(model, chosen, _required(inputs), scratch, path.name)
        else:
            magnitudes = _magnitudes(model, chosen, _required(inputs), scratch, path.name)
            quantize_to_float8(model, chosen, magnitudes)
    new = [tensor for tensor in model.graph.initializer if tensor.name not in before]
    _check_scales(new, path.name)
    return QuantizedGraph(model, len(chosen), len(kept), fp16_bytes, sum(_bytes(tensor) for tensor in new))


def _block(rows: int, options: QuantizationOptions, *, pad: bool) -> int | None:
    """The largest size of block that the rows are a multiple of; MatMulNBits pads, DequantizeLinear does not."""
    fitting = [size for size in BLOCK_SIZES if size <= options.block_size and rows % size == 0]
    return max(fitting) if fitting else (options.block_size if pad else None)


def _weight_only(model: Any, names: Collection[str], block: int, options: QuantizationOptions) -> Any:
    with _quiet():
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        for_cpu = options.form == ONNXRUNTIME
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=block,
            is_symmetric=not for_cpu,  # TensorRT takes no zero point with INT4
            accuracy_level=_INT8_ACTIVATIONS if for_cpu else None,
            nodes_to_exclude=[node.name for node in model.graph.node if node.name not in names],
            quant_format=QuantFormat.QOperator if for_cpu else QuantFormat.QDQ,
        )
        quantizer.process()
        return quantizer.model.model


def _dynamic(model: Any, names: Collection[str], scratch: Path) -> Any:
    with _quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source, target = _saved(model, scratch), scratch / "quantized.onnx"
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(names),
            use_external_data_format=True,
            # What shape inference does not know, operators of other domains for one, has the type of the weights.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(str(target))


def _static(model: Any, names: Collection[str], inputs: RecordedInputs, scratch: Path, graph: str) -> Any:
    with _quiet():
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        source, target = _saved(model, scratch), scratch / "quantized.onnx"
        try:
            quantize_static(
                source,
                target,
                _reader(model, inputs),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=list(names),
                use_external_data_format=True,
                # The others want all activations in arrays of one shape, and prompts differ in length.
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={
                    "ActivationSymmetric": True,  # TensorRT takes no zero point
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                    "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                    "DefaultTensorType": model.graph.input[0].type.tensor_type.elem_type,
                },
            )
        except AssertionError as error:
            # Its check of a scale: false for NaN alone.
            raise QuantizationError(
                f"{graph}: a range of activations is not finite on the samples, and so would be its scale: "
                "check the samples, or export as float32"
            ) from error
        return onnx.load(str(target))


def _magnitudes(
    model: Any, names: Collection[str], inputs: RecordedInputs, scratch: Path, graph: str
) -> dict[str, float]:
    """By activation of the products: the largest magnitude on the calibration samples."""
    activations = {node.input[0] for node in model.graph.node if node.name in names}
    with _quiet():
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

        calibrator = create_calibrator(
            _saved(model, scratch),
            ["MatMul"],
            augmented_model_path=str(scratch / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
        )
        calibrator.collect_data(_reader(model, inputs))
        ranges = calibrator.compute_data()
    found = {}
    for name in activations:
        magnitude = float(np.abs(np.concatenate([np.ravel(end) for end in ranges[name].range_value])).max())
        if not np.isfinite(magnitude):
            raise QuantizationError(
                f"{graph}: {name} is not finite on the samples, and so would be its scale: "
                "check the samples, or export as float32"
            )
        found[name] = magnitude
    return found


def _saved(model: Any, scratch: Path) -> Path:
    """The graph as a file, which may be larger than protobuf's 2 GB with its weights; ``model`` stays whole."""
    path = scratch / "source.onnx"
    onnx.save_model(
        copy.deepcopy(model),
        str(path),
        save_as_external_data=True,
        location="source.data",
        size_threshold=1024,
    )
    return path


def _reader(model: Any, inputs: RecordedInputs) -> Any:
    """The recorded inputs as ONNX Runtime's quantizer wants them."""
    from onnxruntime.quantization import CalibrationDataReader

    names = {value.name for value in model.graph.input}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._runs: Iterator[dict[str, Any]] | None = None

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for run in inputs:
                yield {name: array for name, array in run.items() if name in names}

        def get_next(self) -> Mapping[str, Any] | None:
            self._runs = iter(self) if self._runs is None else self._runs
            return next(self._runs, None)

    return Reader()


def _required(inputs: RecordedInputs | None) -> RecordedInputs:
    assert inputs is not None
    assert len(inputs)
    return inputs


def _check_scales(tensors: Iterable[Any], graph: str) -> None:
    for tensor in tensors:
        if tensor.data_type in _SCALE_BYTES and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise QuantizationError(
                f"{graph}: the scale {tensor.name} is not finite: check the samples, or export as float32"
            )


def _bytes(tensor: Any) -> int:
    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return (int(np.prod(tensor.dims)) * bits + 7) // 8


@contextlib.contextmanager
def _own_errors(graph: str) -> Iterator[None]:
    """ONNX Runtime's quantizer raises whatever comes; a user gets one line of it."""
    try:
        yield
    except (QuantizationError, MemoryError, OSError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise QuantizationError(
            f"ONNX Runtime's quantizer fails on {graph} ({type(error).__name__}: {lines[0][:200] if lines else ''}): "
            "choose another precision or form"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer configures the root logger when it is imported and reports every node; a user needs neither."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
