"""The least time that a machine needs: its peak rate of matrix products, or its memory, whichever is slower.

A prompt of n tokens costs two operations per weight and token, and reads every weight once. Below the *knee*,
n = F·b / (2·B) with F operations and B bytes per second and b bytes per weight, reading takes longer than computing:
fewer tokens save nothing there, narrower weights do.
"""

from dataclasses import dataclass, fields

from edgeprune.errors import TargetError
from edgeprune.stage_cost import StageCost
from edgeprune.targets import Target

BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5, "fp4": 0.5}
PRECISION_OF_DTYPE = {"float32": "fp32", "float16": "fp16"}
COMPUTE, MEMORY = "compute", "memory"


@dataclass(frozen=True)
class Rates:
    """What a machine reaches at its best.

    Attributes:
        flops_per_second: Floating-point operations of matrix products.
        bytes_per_second: Of its memory.
        bytes_per_weight: What a weight occupies.
        bytes_per_value: What any other value occupies.
    """

    flops_per_second: float
    bytes_per_second: float
    bytes_per_weight: float
    bytes_per_value: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"rates: '{field.name}' is {getattr(self, field.name)}, not above 0")

    def seconds(self, cost: StageCost) -> float:
        """The least time of a stage: the longer of computing and moving."""
        return max(self.compute_seconds(cost), self.memory_seconds(cost))

    def compute_seconds(self, cost: StageCost) -> float:
        """Operations at the peak rate."""
        return cost.flops / self.flops_per_second

    def memory_seconds(self, cost: StageCost) -> float:
        """Bytes at the peak bandwidth."""
        return cost.bytes(self.bytes_per_weight, self.bytes_per_value) / self.bytes_per_second

    def bound(self, cost: StageCost) -> str:
        """What limits a stage, "compute" or "memory"."""
        return COMPUTE if self.compute_seconds(cost) >= self.memory_seconds(cost) else MEMORY

    @property
    def knee_tokens(self) -> float:
        """The tokens below which a matrix product only waits for its weights."""
        return self.flops_per_second * self.bytes_per_weight / (2 * self.bytes_per_second)


def default_precision(target: Target, dtype: str) -> str:
    """The bundle's own precision where the target's rate for it is known, else fp16."""
    precision = PRECISION_OF_DTYPE.get(dtype, "fp16")
    return precision if precision in target.tops else "fp16"


def target_rates(target: Target, precision: str) -> Rates:
    """The data sheet's rates of a target.

    Args:
        target: The device.
        precision: Of the weights; int4 holds weights only, they are computed with in fp16.

    Raises:
        TargetError: The target lacks the precision, or its rate is unknown.
    """
    target.check_precision(precision)
    rate = target.tops.get("fp16" if precision == "int4" else precision)
    if rate is None or not target.bandwidth:
        raise TargetError(
            f"{target.title}: its rate in {precision} is unknown, known are {', '.join(target.tops) or 'none'}: "
            "choose one of them, or profile on the device itself"
        )
    return Rates(
        flops_per_second=rate * 1e12,
        bytes_per_second=target.bandwidth,
        bytes_per_weight=BYTES_PER_WEIGHT[precision],
        bytes_per_value=4.0 if precision == "fp32" else 2.0,
    )
