"""The torch reference of float16 weights, computed in float32: faster on a CPU, and nearer to the truth.

Few CPUs multiply float16: torch takes several times as long there as in float32. ONNX Runtime's kernels for the CPU
compute float32, too. Weights stay float16, mapped from their file; each is widened for the product that reads it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from edgeprune.stages import Stage


@contextlib.contextmanager
def float32_arithmetic(stages: Iterable[Stage]) -> Iterator[None]:
    """While it is entered, float16 stages compute in float32; what travels between them stays float16.

    A stage gets its inputs, and every operation its arguments, widened. At the end of a stage its outputs are rounded
    to float16, because that is what the next graph will be given.

    Args:
        stages: The stages.
    """
    hooks = [
        hook
        for stage in stages
        for hook in (
            stage.register_forward_pre_hook(_widen_inputs),
            stage.register_forward_hook(_round_outputs),
        )
    ]
    try:
        with _WideArguments():
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _WideArguments(TorchFunctionMode):
    """Widens what is float16 among the arguments of every function of torch."""

    # Where matrices are widened, as large as the largest so far: fresh memory would cost more than the widening.
    _matrix = torch.empty(0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Neither attributes nor rows of an embedding need the whole tensor in float32.
        if func is F.embedding or getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        if func is F.linear and args[1].dtype == torch.float16:
            args = (args[0], self._widened_matrix(args[1]), *args[2:])
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _widened_matrix(self, weight: Tensor) -> Tensor:
        if self._matrix.numel() < weight.numel():
            self._matrix = torch.empty(weight.numel())
        return self._matrix[: weight.numel()].view(weight.shape).copy_(weight)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _widen_inputs(
    stage: torch.nn.Module,  # noqa: ARG001 - of torch's protocol
    arguments: tuple[Mapping[str, Tensor]],
) -> tuple[dict[str, Tensor]]:
    return ({name: _widened(tensor) for name, tensor in arguments[0].items()},)


def _round_outputs(
    stage: torch.nn.Module,
    inputs: Any,  # noqa: ARG001 - of torch's protocol
    outputs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    assert isinstance(stage, Stage)
    of_the_weights = {spec.name for spec in stage.outputs if spec.dtype == "model"}
    return {
        name: tensor.to(torch.float16) if name in of_the_weights else tensor
        for name, tensor in outputs.items()
    }
