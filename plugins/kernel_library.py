"""The native libraries from Python: the kernels on CUDA tensors, the references on host tensors.

Both have the same functions (``plugins/kernels/*.h``), so one class calls either. It serves tests and benchmarks;
a runtime calls the functions itself. Tensors are dense; outputs are allocated here, the functions allocate nothing.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BackendError
from edgeprune.extras import require
from edgeprune.operators.schema import ATTENTION_SCORE_MODES, PROBABILITIES

if TYPE_CHECKING:
    from torch import Tensor

_ELEMENT_TYPES = ("float32", "float16", "bfloat16")
_SUCCESS = 0


class _AttentionScoreProblem(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "element_type",
                "mode",
                "causal",
                "weights_per_batch",
                "batch",
                "heads",
                "key_heads",
                "query_length",
                "rows",
                "keys",
                "head_dim",
                "groups",
            )
        ),
        ("scale", ctypes.c_float),
    )


class _SoftNmsProblem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("feature_type", "batch", "rows", "features", "table_size")),
        ("similarity_sigma", ctypes.c_float),
    )


class _GatheredTensor(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("outer", "rows", "row_bytes", "source_stride", "target_stride")
        ),
    )


class _CacheLayer(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("cached_rows", "capacity", "target_capacity", "row_bytes")),
    )


class KernelError(BackendError):
    """A function of a native library returned a CUDA error."""


class KernelLibrary:
    """One native library.

    Args:
        path: ``libedgeprune_kernels.so`` or ``libedgeprune_reference.so``.
        device: Where its tensors must be: ``cuda`` or ``cpu``.

    Raises:
        BackendError: The file is not such a library.
    """

    def __init__(self, path: Path, device: str) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"{path} is no usable library ({error}): build it with python -m edgeprune.plugins.build"
            ) from error
        self._torch = require("torch", extra="export", purpose="to call kernels from Python")
        self.device = device
        for name in ("attention_score", "select_by_soft_nms", "select_by_dpp"):
            getattr(self._library, f"edgeprune_{name}_workspace").restype = ctypes.c_size_t

    def attention_score(
        self,
        query: "Tensor",
        key: "Tensor",
        row_index: "Tensor | None",
        row_weight: "Tensor",
        *,
        scale: float,
        mode: str = PROBABILITIES,
        causal: bool = True,
        query_rows: "Tensor | None" = None,
    ) -> "Tensor":
        """As ``edgeprune.operators.attention_score``; ``query_rows`` picks the rows of ``query`` that score."""
        B, H, Q, D = query.shape
        Hkv, S = key.shape[1:3]
        G, R = row_weight.shape[-2:]
        problem = _AttentionScoreProblem(
            _element_type(query),
            ATTENTION_SCORE_MODES.index(mode),
            causal,
            row_weight.dim() == 3,
            B,
            H,
            Hkv,
            Q,
            R,
            S,
            D,
            G,
            scale,
        )
        score = self._empty((B, G, S), "float32")
        workspace = self._workspace("attention_score", problem)
        tensors = (query, key, query_rows, row_index, row_weight, score, workspace)
        self._call("attention_score", ctypes.byref(problem), *tensors)
        return score

    def select_by_threshold(
        self, scores: "Tensor", thresholds: "Tensor", droppable: "Tensor"
    ) -> tuple["Tensor", "Tensor"]:
        """Scores and thresholds [B, P, S], droppable [B, S] → keep_indices [B, S], keep_count [B]."""
        B, P, S = scores.shape
        order, count = self._selection(B, S)
        sizes = (ctypes.c_int32(B), ctypes.c_int32(P), ctypes.c_int32(S))
        self._call("select_by_threshold", *sizes, scores, thresholds, droppable, order, count)
        return order, count

    def select_top_k(
        self, scores: "Tensor", num_keep: "Tensor", droppable: "Tensor"
    ) -> tuple["Tensor", "Tensor"]:
        """Scores [B, S], num_keep [B], droppable [B, S] → keep_indices [B, S], keep_count [B]."""
        B, S = scores.shape
        order, count = self._selection(B, S)
        sizes = (ctypes.c_int32(B), ctypes.c_int32(S))
        self._call("select_top_k", *sizes, scores, num_keep, droppable, order, count)
        return order, count

    def select_by_soft_nms(
        self,
        scores: "Tensor",
        num_keep: "Tensor",
        droppable: "Tensor",
        features: "Tensor",
        places: "Tensor",
        nearness: "Tensor",
        *,
        similarity_sigma: float,
    ) -> tuple["Tensor", "Tensor"]:
        """Scores [B, S], num_keep [B], droppable [B, S], features [B, S, F], places [B, S, 2], nearness [W]."""
        B, S, F = features.shape
        order, count = self._selection(B, S)
        problem = _SoftNmsProblem(_element_type(features), B, S, F, nearness.shape[0], similarity_sigma)
        workspace = self._workspace("select_by_soft_nms", problem)
        tensors = (scores, num_keep, droppable, features, places, nearness, order, count, workspace)
        self._call("select_by_soft_nms", ctypes.byref(problem), *tensors)
        return order, count

    def select_by_dpp(
        self,
        kernel: "Tensor",
        num_keep: "Tensor",
        droppable: "Tensor",
        groups: "Tensor",
        group_keep: "Tensor",
    ) -> tuple["Tensor", "Tensor"]:
        """Kernel [B, S, S], num_keep [B], droppable, groups and group_keep [B, S]."""
        B, S = droppable.shape
        order, count = self._selection(B, S)
        sizes = (ctypes.c_int32(B), ctypes.c_int32(S))
        workspace = self._empty((self._library.edgeprune_select_by_dpp_workspace(*sizes),), "uint8")
        tensors = (kernel, num_keep, droppable, groups, group_keep, order, count, workspace)
        self._call("select_by_dpp", *sizes, *tensors)
        return order, count

    def token_gather(
        self, keep_indices: "Tensor", tensors: Sequence["Tensor"], axes: Sequence[int]
    ) -> list["Tensor"]:
        """As ``edgeprune.operators.token_gather``."""
        kept = keep_indices.shape[0]
        outputs, entries = [], (_GatheredTensor * len(tensors))()
        for entry, tensor, axis in zip(entries, tensors, axes, strict=True):
            self._check(tensor)
            shape = list(tensor.shape)
            output = self._empty((*shape[:axis], kept, *shape[axis + 1 :]), _dtype_name(tensor))
            outputs.append(output)
            outer, inner = _product(shape[:axis]), _product(shape[axis + 1 :])
            row_bytes = inner * tensor.element_size()
            entry.source, entry.target = tensor.data_ptr(), output.data_ptr()
            entry.outer, entry.rows, entry.row_bytes = outer, shape[axis], row_bytes
            entry.source_stride, entry.target_stride = shape[axis] * row_bytes, kept * row_bytes
        self._call("token_gather", entries, ctypes.c_int32(len(tensors)), keep_indices, ctypes.c_int64(kept))
        return outputs

    def compact_cache(
        self, keys: "Tensor", values: "Tensor", keep_indices: "Tensor", *, cached_rows: int, capacity: int
    ) -> tuple["Tensor", "Tensor"]:
        """Rows of keys and values [B, Hkv, P', D], of which ``cached_rows`` are used, to [B, Hkv, capacity, D].

        What lies behind the kept rows is not written.
        """
        B, Hkv, source_capacity, D = keys.shape
        kept = keep_indices.shape[0]
        layer = _CacheLayer(B, Hkv, cached_rows, source_capacity, capacity, D * keys.element_size())
        kept_keys, kept_values = (
            self._torch.zeros((B, Hkv, capacity, D), dtype=keys.dtype, device=self.device) for _ in "kv"
        )
        sizes = (ctypes.byref(layer), keys, values, keep_indices, ctypes.c_int64(kept))
        self._call("compact_cache", *sizes, kept_keys, kept_values)
        return kept_keys, kept_values

    def _selection(self, B: int, S: int) -> tuple["Tensor", "Tensor"]:
        return self._empty((B, S), "int64"), self._empty((B,), "int64")

    def _workspace(self, function: str, problem: ctypes.Structure) -> "Tensor":
        size: int = getattr(self._library, f"edgeprune_{function}_workspace")(ctypes.byref(problem))
        return self._empty((size,), "uint8")

    def _empty(self, shape: tuple[int, ...], dtype: str) -> "Tensor":
        tensor: Tensor = self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)
        return tensor

    def _check(self, tensor: "Tensor") -> None:
        if tensor.device.type != self.device or not tensor.is_contiguous():
            raise BackendError(
                f"the library takes dense tensors on {self.device}; got one on {tensor.device} with strides "
                f"{tensor.stride()}: use .contiguous().to('{self.device}')"
            )

    def _call(self, function: str, *arguments: Any) -> None:
        passed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, self._torch.Tensor):
                self._check(argument)
                passed.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                passed.append(argument)
        stream = self._torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        status = getattr(self._library, f"edgeprune_{function}")(*passed, ctypes.c_void_p(stream))
        if status != _SUCCESS:
            raise KernelError(
                f"edgeprune_{function} returned CUDA error {status}"
                + (": the sizes are not valid or too large" if status == 1 else "")
            )


def _element_type(tensor: "Tensor") -> int:
    name = _dtype_name(tensor)
    if name not in _ELEMENT_TYPES:
        raise BackendError(f"the kernels take {', '.join(_ELEMENT_TYPES)}; got {name}: convert the tensor")
    return _ELEMENT_TYPES.index(name)


def _dtype_name(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
