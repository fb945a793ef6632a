"""What calibration measured and chose, as the manifest holds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from edgeprune.errors import BundleError

ONNX_GRAPHS = "onnx graphs"
FLOPS, LATENCY_TABLE = "flops", "latency table"


@dataclass(frozen=True)
class DistributionEntry:
    """How often a number was seen.

    Attributes:
        values: The numbers, ascending.
        counts: How often each was seen.
        mean: Their mean.
        max: The largest.
        quantiles: By share, "0.9": the least number that this share of all does not exceed.
    """

    values: tuple[int, ...]
    counts: tuple[int, ...]
    mean: float
    max: int
    quantiles: dict[str, int]

    def __post_init__(self) -> None:
        ascending = all(before < after for before, after in pairwise(self.values))
        if (
            not self.values
            or len(self.values) != len(self.counts)
            or not ascending
            or self.values[0] < 0
            or min(self.counts) < 1
            or self.max != self.values[-1]
        ):
            raise BundleError("the manifest's calibration has a broken histogram: calibrate the bundle again")

    @property
    def total(self) -> int:
        """How many numbers were seen."""
        return sum(self.counts)

    def quantile(self, share: float) -> int:
        """The least number seen that at least this share of all does not exceed."""
        needed, seen = share * self.total, 0
        for value, count in zip(self.values, self.counts, strict=True):
            seen += count
            # A share such as 0.07 times 100 is 7.000000000000001.
            if seen >= needed - 1e-9:
                return value
        return self.max


@dataclass(frozen=True)
class BucketEntry:
    """A range of rows that gets an optimization profile.

    Attributes:
        least: Fewest rows.
        tuned: Rows that kernels are tuned for.
        greatest: Most rows.
        prompts: Calibration prompts that fall into it.
    """

    least: int
    tuned: int
    greatest: int
    prompts: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.tuned <= self.greatest or self.prompts < 0:
            raise BundleError(
                f"the manifest's calibration has a broken bucket ({self.least}, {self.tuned}, {self.greatest}): "
                "calibrate the bundle again"
            )


@dataclass(frozen=True)
class SegmentBucketsEntry:
    """The buckets of a segment's prefill; decoding has a profile of its own.

    Attributes:
        allowed: How many were asked for; fewer are chosen where fewer different lengths were seen.
        buckets: From 1 row to the most, without gap or overlap.
        gain: Share of the expected time of prefill that they save compared with the best single bucket.
    """

    allowed: int
    buckets: tuple[BucketEntry, ...]
    gain: float

    def __post_init__(self) -> None:
        joined = all(before.greatest + 1 == after.least for before, after in pairwise(self.buckets))
        if not 1 <= len(self.buckets) <= self.allowed or self.buckets[0].least != 1 or not joined:
            raise BundleError(
                "the manifest's calibration has buckets with gaps or more than allowed: calibrate the bundle again"
            )


@dataclass(frozen=True)
class CalibrationEntry:
    """What running a bundle on example data showed, and the profiles chosen by it.

    Attributes:
        edgeprune_version: Version that calibrated.
        data_sha256: Hash over prompt and pictures of every sample, in their order.
        samples: Samples that were run.
        skipped: Lines and pictures that could not be used.
        max_new_tokens: Most tokens that were generated.
        keep_per_image: By site: visual tokens that leave it, of every picture.
        sequence_lengths: By segment: rows that enter it in prefill.
        text_lengths: Rows of a prompt that are no visual tokens.
        generated_lengths: Generated tokens, without the end token.
        tiles: Tiles of a prompt's pictures.
        cost: What time was expected by: "flops", or a measured "latency table".
        max_sequence: Most rows that the buckets cover.
        fallback: What takes longer prompts: "onnx graphs"; null where the buckets cover the model's context.
        prefill: By segment with attention: the chosen buckets.
    """

    edgeprune_version: str
    data_sha256: str
    samples: int
    skipped: int
    max_new_tokens: int
    keep_per_image: dict[str, DistributionEntry]
    sequence_lengths: dict[str, DistributionEntry]
    text_lengths: DistributionEntry
    generated_lengths: DistributionEntry
    tiles: DistributionEntry
    cost: str
    max_sequence: int
    fallback: str | None
    prefill: dict[str, SegmentBucketsEntry]

    def __post_init__(self) -> None:
        if self.cost not in (FLOPS, LATENCY_TABLE) or self.fallback not in (None, ONNX_GRAPHS):
            raise BundleError(
                f"the manifest's calibration names an unknown cost {self.cost!r} or fallback {self.fallback!r}: "
                "calibrate the bundle again"
            )
        if self.samples < 1 or any(
            entry.buckets[-1].greatest != self.max_sequence for entry in self.prefill.values()
        ):
            raise BundleError(
                "the manifest's calibration does not cover its own longest prompt: calibrate the bundle again"
            )

    def check_names(self, segments: Sequence[str], sites: Sequence[str]) -> None:
        """Compare with the graphs of the bundle.

        Raises:
            BundleError: Statistics of another bundle's graphs.
        """
        if (
            set(self.sequence_lengths) != set(segments)
            or set(self.keep_per_image) != set(sites)
            or not set(self.prefill) <= set(segments)
        ):
            raise BundleError(
                "the manifest's calibration does not fit its segments and sites: calibrate the bundle again"
            )
