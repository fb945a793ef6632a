"""Weights as ONNX external data: written tensor by tensor, never gathered in memory, shared between graphs."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from edgeprune.export.passes.fold_transposed_weights import SOURCE

# Small tensors stay in the model; ONNX Runtime and TensorRT read shapes and axes from there.
_MIN_BYTES = 1024
# A memory-mapped file is readable at page granularity; ONNX Runtime maps tensors that start on a page.
_PAGE = 4096


@dataclass
class WeightStore:
    """Writes the weights of several graphs into one folder.

    A tensor that two graphs use (tied embeddings, for one) is written once, by the first. Weights of torch are known by
    their memory, others by their content.

    Attributes:
        folder: Where graphs and data lie.
    """

    folder: Path
    _written: dict[tuple[object, ...], tuple[str, int, int]] = field(default_factory=dict)
    # An address names a tensor only as long as it lives.
    _kept: list[object] = field(default_factory=list)

    def externalise(self, model: ir.Model, file_name: str) -> list[str]:
        """Move the model's large initializers into ``file_name``; returns the data files that the model reads."""
        used: dict[str, None] = {}
        with (self.folder / file_name).open("wb") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _MIN_BYTES:
                    continue
                location, offset, length = self._place(tensor, file, file_name)
                used[location] = None
                value.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    length,
                    dtype=tensor.dtype,
                    shape=ir.Shape(tensor.shape),
                    name=value.name or "",
                    base_dir=self.folder,
                )
            empty = file.tell() == 0
        if empty:
            (self.folder / file_name).unlink()
        return list(used)

    def _place(self, tensor: ir.TensorProtocol, file: BinaryIO, file_name: str) -> tuple[str, int, int]:
        """Where a tensor lies (file, offset, length); writes it if no graph has."""
        source = tensor.meta.get(SOURCE)
        raw: Any = getattr(tensor if source is None else source, "raw", None)
        key: tuple[object, ...] | None = None
        # Of torch, which is not imported here: quantizing needs this file, too, and no torch.
        if hasattr(raw, "data_ptr"):
            key = (raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype, source is None)
            if key in self._written:
                return self._written[key]
            self._kept.append(raw)
        content = tensor.tobytes()
        if key is None:
            key = (hashlib.sha256(content).digest(),)
            if key in self._written:
                return self._written[key]
        file.write(b"\0" * (-file.tell() % _PAGE))
        self._written[key] = (file_name, file.tell(), tensor.nbytes)
        file.write(content)
        return self._written[key]
