"""Does a graph compute what the torch reference computes? Measured while exporting, on real runs of the model."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import ParityError
from edgeprune.export.float32_arithmetic import float32_arithmetic
from edgeprune.manifest import ParityEntry
from edgeprune.onnxruntime_module import onnxruntime_module
from edgeprune.pruned_model import Prefill, PrunedModel
from edgeprune.runtimes.float16_weights import keep_float16
from edgeprune.runtimes.guide import GuideInputs
from edgeprune.runtimes.pictures import PreparedPictures
from edgeprune.stages import Stage

# Relative to the largest magnitude of the output (at least 1).
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True)
class Prompt:
    """One run of the model that the graphs are compared on.

    Attributes:
        description: What it is, for messages.
        token_ids: [S] int64, placeholders included.
        pictures: Preprocessed, None without pictures.
        guide: The instruction for CLIP, if the pruning needs it.
    """

    description: str
    token_ids: NDArray[np.int64]
    pictures: PreparedPictures | None
    guide: GuideInputs | None


@dataclass(frozen=True)
class StageCase:
    """One recorded run of one stage."""

    description: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def reference_arithmetic(model: PrunedModel) -> contextlib.AbstractContextManager[None]:
    """What the reference runs under: with float16 weights it computes in float32."""
    return float32_arithmetic(model.stages) if model.dtype == torch.float16 else contextlib.nullcontext()


def record_cases(
    model: PrunedModel, prompts: Sequence[Prompt], decode_steps: int = 2
) -> dict[str, list[StageCase]]:
    """Run the torch reference and keep what went into and came out of every stage, by the stage's name.

    Each prompt gives a prefill, the first one also some decode steps, so that every graph is seen at several lengths,
    with and without a cache, and with the K of a real picture.
    """
    cases: dict[str, list[StageCase]] = {}

    def keep(description: str, record: Iterable[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]]) -> None:
        for stage, inputs, outputs in record:
            cases.setdefault(stage.name, []).append(StageCase(description, dict(inputs), dict(outputs)))

    for index, prompt in enumerate(prompts):
        prefill: Prefill = model.prefill(prompt.token_ids, prompt.pictures, prompt.guide, record=True)
        keep(f"prefill of {prompt.description}", prefill.record)
        if index == 0:
            logits = prefill.logits
            for step in range(decode_steps):
                record: list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]] = []
                token = int(logits.argmax())
                logits = model.decode(
                    token, prefill.next_position + step, prefill.caches, record, prefill.eviction
                )
                keep(f"decode step {step + 1}", record)
            if model.compact is not None:
                keep("every other row of a cache", _compaction(model, prefill))
    return cases


def _compaction(
    model: PrunedModel, prefill: Prefill
) -> list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]]:
    """A run of the compaction, which a short answer may not need."""
    record: list[tuple[Stage, dict[str, Tensor], dict[str, Tensor]]] = []

    def run(stage: Stage, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = stage(inputs)
        record.append((stage, inputs, outputs))
        return outputs

    key, value = next(iter(prefill.caches.values()))
    model.compact_cache(key, value, torch.arange(0, key.shape[2], 2), run)
    return record


def check_graph(path: Path, cases: Sequence[StageCase], dtype: torch.dtype) -> ParityEntry:
    """Run a graph with ONNX Runtime on the CPU and compare it with the reference.

    Raises:
        ParityError: An output differs by more than the tolerance, or an index differs at all.
    """
    onnxruntime: Any = onnxruntime_module(extra="export", purpose="to check the exported graphs")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if dtype == torch.float16:
        keep_float16(onnxruntime, options)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # every failure has a class of its own, without a common base
        raise ParityError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {path.name} ({error}): "
            "install another version, or report it with the checkpoint's config.json"
        ) from error
    names = [output.name for output in session.get_outputs()]
    fed = {value.name for value in session.get_inputs()}
    worst, has_indices = 0.0, False
    tolerance = TOLERANCES[dtype]
    for case in cases:
        feed = {name: tensor.numpy() for name, tensor in case.inputs.items() if name in fed}
        for name, actual in zip(names, session.run(names, feed), strict=True):
            expected = case.outputs[name].numpy()
            where = f"{path.name}, output {name}, {case.description}"
            if actual.shape != expected.shape:
                raise ParityError(f"{where}: shape {list(actual.shape)}, torch has {list(expected.shape)}")
            if np.issubdtype(expected.dtype, np.integer):
                has_indices = True
                if not np.array_equal(actual, expected):
                    raise ParityError(
                        f"{where}: {int((actual != expected).sum())} of {actual.size} indices differ from torch: "
                        "please report it with the checkpoint's config.json"
                    )
                continue
            if not expected.size:
                continue
            difference = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())
            scale = max(1.0, float(np.abs(expected.astype(np.float64)).max()))
            if not difference <= tolerance * scale:
                raise ParityError(
                    f"{where}: differs from torch by {difference:.2e}, accepted is {tolerance * scale:.2e}: "
                    "export as float32, or report it with the checkpoint's config.json"
                )
            worst = max(worst, difference)
    return ParityEntry(
        cases=len(cases),
        max_abs_diff=worst,
        tolerance=tolerance,
        indices_identical=True if has_indices else None,
    )
