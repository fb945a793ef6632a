"""Stage → ONNX graph, by torch.onnx's exporter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from edgeprune.export.operators import TRANSLATIONS, attach_functions, stable_sort
from edgeprune.export.passes import fold_transposed_weights
from edgeprune.stages import Stage
from edgeprune.tensor_spec import TensorSpec

# Sizes that stand for dynamic dimensions while tracing: all different, and neither 0 nor 1, which torch specialises.
_EXAMPLE_SIZES = {
    "sequence": 19,
    "past": 7,
    "tiles": 2,
    "patch_rows": 37,
    "patches": 144,
    "pictures": 8,
    "longest_picture": 43,
    "windows": 17,
    "grids": 3,
    "slots": 41,
    "visual_tokens": 11,
    "text_rows": 5,
    "context_rows": 13,
    "probe_rows": 3,
    "chunks": 4,
    "guide_tokens": 23,
    "kept": 9,
    "prompt": 29,
    "recycled": 6,
    "merged": 4,
    "past + sequence": 31,
}

TORCH_DTYPES = {"int64": torch.int64, "float32": torch.float32}


def trace_stage(stage: Stage, dtype: torch.dtype, opset: int) -> ir.Model:
    """Trace one stage with dynamic dimensions.

    The weights stay torch tensors (memory-mapped if they were); nothing is copied.

    Args:
        stage: The stage.
        dtype: Type of its weights.
        opset: ONNX opset of the graph.
    """
    example = {spec.name: _example(spec, dtype) for spec in stage.inputs}
    dynamic = {
        spec.name: {
            axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if isinstance(size, str)
        }
        for spec in stage.inputs
    }
    with _quiet():
        program = torch.onnx.export(
            stage,
            kwargs={"inputs": example},
            dynamic_shapes={"inputs": dynamic},
            input_names=[spec.name for spec in stage.inputs],
            output_names=[spec.name for spec in stage.outputs],
            opset_version=opset,
            custom_translation_table={**TRANSLATIONS, torch.ops.aten.sort.stable: stable_sort.translation},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        # Before the optimizer, which would fold the same transpositions by computing all of them at once.
        fold_transposed_weights.apply(program.model)
        program.optimize()
    model = program.model
    model.producer_name = "edgeprune"
    model.graph.name = stage.name
    _name_dimensions(model, stage)
    attach_functions(model)
    return model


def _example(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    sizes = _EXAMPLE_SIZES
    shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
    return torch.zeros(shape, dtype=dtype if spec.dtype == "model" else TORCH_DTYPES[spec.dtype])


def _name_dimensions(model: ir.Model, stage: Stage) -> None:
    """Give inputs and outputs the dimension names of the stage; equal names mean equal values."""
    for value, spec in zip(
        [*model.graph.inputs, *model.graph.outputs], [*stage.inputs, *stage.outputs], strict=True
    ):
        assert value.name == spec.name, (value.name, spec.name)
        value.shape = ir.Shape(spec.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and torch its internals; a user needs neither."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
