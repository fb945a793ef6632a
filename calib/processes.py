"""The processes that train together: this one alone, or those that ``accelerate launch`` has started."""

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from edgeprune.errors import BackendError
from edgeprune.extras import require


class Processes(Protocol):
    """A group of processes that run the same steps on parts of the same batches.

    Attributes:
        rank: Which one this is, 0 is the one that writes.
        count: How many there are.
        device: Where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, without a gradient."""

    def wait(self) -> None:
        """Wait for the others."""


class OneProcess:
    """This process alone."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = 0, 1, device

    def mean(self, value: Tensor) -> Tensor:
        """The value."""
        return value.detach()

    def wait(self) -> None:
        """Nothing to wait for."""


class AcceleratedProcesses:
    """Those of ``accelerate launch``."""

    def __init__(self, device: str | None) -> None:
        accelerate = require("accelerate", extra="fit", purpose="to train with several processes")
        self._accelerator: Any = accelerate.Accelerator(cpu=device == "cpu")
        self.rank = int(self._accelerator.process_index)
        self.count = int(self._accelerator.num_processes)
        self.device: torch.device = self._accelerator.device

    def mean(self, value: Tensor) -> Tensor:
        """Reduced over all processes."""
        reduced: Tensor = self._accelerator.reduce(value.detach().clone(), reduction="mean")
        return reduced

    def wait(self) -> None:
        """A barrier."""
        self._accelerator.wait_for_everyone()


def choose_processes(device: str | None) -> Processes:
    """The processes that this one was started with.

    Args:
        device: As torch names it; None takes a GPU if there is one. Of several processes each gets its own, and only
            "cpu" can be asked for.

    Raises:
        BackendError: There is no such device.
        MissingExtraError: There are several processes, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return AcceleratedProcesses(device)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendError(
            f"there is no device '{device}' ({reason}): use cpu, or cuda with a GPU"
        ) from error
    return OneProcess(chosen)


def joined(processes: Processes, value: Tensor) -> Tensor:
    """The mean over all processes with the gradient of this one's part.

    Gradients are averaged afterwards, so together they are those of the whole batch.
    """
    if processes.count == 1:
        return value
    return value + (processes.mean(value) - value.detach())
