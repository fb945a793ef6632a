"""What a user asks of a build of engines."""

import math
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import EngineError
from edgeprune.runtimes.engine_plugin import PLUGIN_AUTO, PLUGIN_CHOICES
from edgeprune.runtimes.engine_profiles import AUTO
from edgeprune.targets import GIB, Target, find_target

_MIB = 2**20


@dataclass(frozen=True)
class BuildOptions:
    """For whom engines are built and how large; what only a bundle can tell is checked against it when building.

    Attributes:
        target: Name of the target, see :func:`edgeprune.targets.targets`.
        precision: Of weights and activations; None = the bundle's own.
        profile_choice: "auto", "one", "split", or a file of profiles (:mod:`edgeprune.runtimes.engine_profiles`).
        max_images: Most typical pictures in a prompt; None = 4, or as many as fit.
        max_sequence: Most rows of a prompt with its answer; None = the calibration's, or the model's context.
        workspace_mib: Most scratch memory of a layer, in MiB; None = TensorRT's own choice.
        memory_gib: Memory of the device in GiB, where it is another than the target's.
        plugin: "auto" (TensorRT's plugins of the operators where they can be loaded), "on" or "off".

    Raises:
        TargetError: The target or the precision is unknown, or the target lacks the precision.
        EngineError: A size is not positive, or the choice of the plugin is unknown.
    """

    target: str
    precision: str | None = None
    profile_choice: str | Path = AUTO
    max_images: int | None = None
    max_sequence: int | None = None
    workspace_mib: float | None = None
    memory_gib: float | None = None
    plugin: str = PLUGIN_AUTO

    def __post_init__(self) -> None:
        device = self.device
        if self.precision is not None:
            device.check_precision(self.precision)
        for option, size, unit in (
            ("workspace", self.workspace_mib, "MiB"),
            ("memory", self.memory_gib, "GiB"),
        ):
            if size is not None and not (math.isfinite(size) and size * _MIB >= 1):
                raise EngineError(f"--{option} is {size:g} {unit}: give a positive number of {unit}")

        if self.plugin not in PLUGIN_CHOICES:
            raise EngineError(f"--plugin is '{self.plugin}': give one of {', '.join(PLUGIN_CHOICES)}")

    @property
    def device(self) -> Target:
        """The target."""
        return find_target(self.target)

    @property
    def workspace_bytes(self) -> int | None:
        """Most scratch memory of a layer."""
        return None if self.workspace_mib is None else int(self.workspace_mib * _MIB)

    @property
    def usable_bytes(self) -> int:
        """What engines may use of the device's memory."""
        device = self.device
        memory = device.memory_bytes if self.memory_gib is None else int(self.memory_gib * GIB)
        return max(0, memory - device.memory_bytes + device.usable_bytes)
