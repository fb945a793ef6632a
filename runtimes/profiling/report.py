"""A profile as data: what ``--json`` prints; docs/profiling.md describes every field."""

from dataclasses import dataclass
from typing import Any

from edgeprune.errors import BundleError, ProfileError
from edgeprune.json_data import from_json, to_json
from edgeprune.runtimes.profiling.machine import MachineEntry
from edgeprune.runtimes.profiling.machine_peak import MachinePeak
from edgeprune.runtimes.profiling.recorder import Span
from edgeprune.runtimes.profiling.summary import Histogram, Summary

FORMAT_VERSION = 1
GROUPS = ("host", "vision", "embed", "prefill", "select", "wait", "decode")
SCOPES = ("prefill", "first token", "decode")


@dataclass(frozen=True)
class SettingsEntry:
    """How a profile was measured.

    Attributes:
        runs: Rounds that count.
        warmup: Rounds before them.
        max_new_tokens: Tokens of every answer.
        samples: "given" or "drawn".
        prompts: Names of the prompts that were asked.
        left_out: Prompts that were given and not asked, because there were fewer rounds.
        backend: What ran the graphs.
        threads: Threads of an operator; None where the runtime chose.
    """

    runs: int
    warmup: int
    max_new_tokens: int
    samples: str
    prompts: tuple[str, ...]
    left_out: int
    backend: str
    threads: int | None


@dataclass(frozen=True)
class RooflineEntry:
    """A stage beside the least time that the machine's peak rates allow.

    Attributes:
        milliseconds: That least time, the mean over the runs.
        bound: What limits it, "compute" or "memory".
        flops_share: Achieved share of the peak rate of matrix products.
        bandwidth_share: Achieved share of the peak bandwidth.
        efficiency: Least time over measured time, of all runs together. Above 1 where weights stay in a cache.
    """

    milliseconds: float
    bound: str
    flops_share: float
    bandwidth_share: float
    efficiency: float


@dataclass(frozen=True)
class StageEntry:
    """A stage.

    Attributes:
        name: As in an answer's timings.
        group: One of ``GROUPS``.
        nested: Whether its time is part of another stage's.
        milliseconds: Of a run; of "decode" and what is nested in it, of a step.
        flops: Floating-point operations, mean; None where the cost model has none.
        bytes: Least bytes moved, mean.
        roofline: Beside the machine's peak; None without a peak or a cost.
    """

    name: str
    group: str
    nested: bool
    milliseconds: Summary
    flops: float | None
    bytes: float | None
    roofline: RooflineEntry | None

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"stage {self.name}: group {self.group!r}, known: {', '.join(GROUPS)}")


@dataclass(frozen=True)
class SiteEntry:
    """Where tokens are dropped.

    Attributes:
        name: Of its graph.
        place: In words.
        tokens_in: Visual tokens that entered it.
        kept: Visual tokens that left it.
        histogram: Of ``kept``.
    """

    name: str
    place: str
    tokens_in: Summary
    kept: Summary
    histogram: Histogram


@dataclass(frozen=True)
class LayerEntry:
    """Visual tokens that enter a decoder layer.

    Attributes:
        min: In the run with the fewest.
        mean: Over the runs.
        max: In the run with the most.
    """

    min: int
    mean: float
    max: int


@dataclass(frozen=True)
class MemoryEntry:
    """Bytes.

    Attributes:
        host_peak: Of a process that opens this bundle alone and answers the first prompt; None if it could not run.
        device_peak: What the device's memory in use grew by meanwhile; None without an NVIDIA GPU.
        weights: Files of weights, each once.
        kv_cache: After prefill, mean over the runs; the runtime holds twice that.
    """

    host_peak: int | None
    device_peak: int | None
    weights: int
    kv_cache: float


@dataclass(frozen=True)
class EnergyEntry:
    """What the board's sensors said while this bundle answered.

    Attributes:
        watts: Of the whole board, mean.
        joules_per_token: Of prompt and answer together, by generated token.
        readings: Number of readings that the mean is of.
    """

    watts: float
    joules_per_token: float
    readings: int


@dataclass(frozen=True)
class RunEntry:
    """One answer.

    Attributes:
        round: The turn.
        prompt: Index among the settings' prompts.
        first_token_ms: To the first token.
        prefill_ms: Of the decoder, sites included.
        total_ms: To the last token.
        text_tokens: Rows of text.
        entering: Visual tokens that entered the decoder.
        kept: Visual tokens that left every site.
    """

    round: int
    prompt: int
    first_token_ms: float
    prefill_ms: float
    total_ms: float
    text_tokens: int
    entering: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class BundleEntry:
    """One bundle's measurements.

    Attributes:
        name: Of its folder, with a number behind it where two have the same.
        source_sha256: Of the checkpoint.
        model_type: Hugging Face's family.
        dtype: Of the weights.
        methods: That prune; empty = unpruned.
        first_token_ms: To the first token.
        prefill_ms: Of the decoder, sites included.
        decode_ms: Of a decode step.
        total_ms: Of an answer.
        tokens_per_second: Behind the first token, of all runs together.
        average_visual_tokens: In a decoder layer, over layers and runs.
        flops: Of tower, projector and prefill, mean over the runs.
        prefill_flops: Of the decoder's prefill, mean over the runs.
        stages: Up to the first token in the order in which they run, then the decode step.
        decode_steps: Milliseconds of every decode step, by its place in the answer.
        sites: Where tokens are dropped.
        layers: Of the decoder.
        memory: Bytes.
        energy: None without sensors.
        runs: Every answer.
        timeline: Spans of the answer whose time to the first token is the median.
    """

    name: str
    source_sha256: str
    model_type: str
    dtype: str
    methods: tuple[str, ...]
    first_token_ms: Summary
    prefill_ms: Summary
    decode_ms: Summary | None
    total_ms: Summary
    tokens_per_second: float | None
    average_visual_tokens: float
    flops: float
    prefill_flops: float
    stages: tuple[StageEntry, ...]
    decode_steps: tuple[Summary, ...]
    sites: tuple[SiteEntry, ...]
    layers: tuple[LayerEntry, ...]
    memory: MemoryEntry
    energy: EnergyEntry | None
    runs: tuple[RunEntry, ...]
    timeline: tuple[Span, ...]


@dataclass(frozen=True)
class ComparisonEntry:
    """The first bundle beside another.

    Attributes:
        against: Name of the other.
        scope: "prefill" (the decoder's, sites included), "first token" (everything up to it; operations of tower,
            projector and prefill) or "decode" (a step).
        time_ratio: Own time over the other's, round by round.
        flops_ratio: Own operations over the other's.
        saving_efficiency: (1 − time ratio) / (1 − FLOPs ratio) with the median time ratio; None where no operations
            are saved, and of "decode", which waits for weights and not for operations.
        predicted_time_ratio: What the roofline of this machine says; None without one.
    """

    against: str
    scope: str
    time_ratio: Summary
    flops_ratio: float
    saving_efficiency: float | None
    predicted_time_ratio: float | None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"comparison: scope {self.scope!r}, known: {', '.join(SCOPES)}")


@dataclass(frozen=True)
class PredictedStage:
    """A stage on a target.

    Attributes:
        name: As in an answer's timings.
        tokens: Rows that enter it; of the tower, visual tokens before pruning.
        milliseconds: Least time, mean over the runs' counts.
        bound: What limits it, "compute" or "memory".
    """

    name: str
    tokens: float
    milliseconds: float
    bound: str


@dataclass(frozen=True)
class PredictedBundle:
    """A bundle on a target.

    Attributes:
        name: The bundle's.
        stages: Those that the cost model knows.
        first_token_ms: Their sum.
        decode_ms: Of a step.
    """

    name: str
    stages: tuple[PredictedStage, ...]
    first_token_ms: float
    decode_ms: float | None


@dataclass(frozen=True)
class PredictionEntry:
    """A roofline prediction from data sheets: nothing of it was measured.

    Attributes:
        target: Its name.
        title: Its full name.
        precision: Of the weights.
        flops_per_second: Dense matrix products.
        bytes_per_second: Of its memory.
        knee_tokens: Below so many tokens prefill only reads weights.
        int4_knee_tokens: The same with weights of four bits; None where the target has none.
        bundles: One per bundle.
    """

    target: str
    title: str
    precision: str
    flops_per_second: float
    bytes_per_second: float
    knee_tokens: float
    int4_knee_tokens: float | None
    bundles: tuple[PredictedBundle, ...]


@dataclass(frozen=True)
class ProfileReport:
    """A profile.

    Attributes:
        format_version: Raised when a field changes its meaning or goes away.
        edgeprune_version: That measured.
        created: Date and time in UTC, ISO 8601.
        machine: Where.
        board_state: Power mode and clocks of a Jetson; empty elsewhere.
        peak: What the machine reached at its best; None where it was not measured.
        knee_tokens: Of this machine, from its peak.
        settings: How.
        bundles: The profiled one first.
        comparisons: With each of the others.
        predictions: For each target.
        notes: What a reader should know before trusting a number.
    """

    format_version: int
    edgeprune_version: str
    created: str
    machine: MachineEntry
    board_state: dict[str, str]
    peak: MachinePeak | None
    knee_tokens: float | None
    settings: SettingsEntry
    bundles: tuple[BundleEntry, ...]
    comparisons: tuple[ComparisonEntry, ...]
    predictions: tuple[PredictionEntry, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ProfileError(
                f"the profile has format {self.format_version}, this version reads {FORMAT_VERSION}: profile again"
            )
        if not self.bundles:
            raise ProfileError("the profile holds no bundle: profile again")

    def to_json(self) -> Any:
        """Plain JSON values."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any) -> "ProfileReport":
        """Read what :meth:`to_json` gave.

        Raises:
            ProfileError: It is no profile of this version.
        """
        try:
            return from_json(cls, data, "profile")
        except (BundleError, ValueError) as error:
            raise ProfileError(f"no profile that this version reads ({error}): profile again") from error
