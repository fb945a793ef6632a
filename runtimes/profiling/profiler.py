"""Bundles → a profile."""

import datetime as dt
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from PIL import Image

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.errors import ProfileError
from edgeprune.manifest import GeometryEntry, Manifest
from edgeprune.roofline import Rates, default_precision, target_rates
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.profiling.assembly import bundle_entry, compare, run_costs
from edgeprune.runtimes.profiling.jetson import PowerSensor, energy
from edgeprune.runtimes.profiling.machine import describe_machine
from edgeprune.runtimes.profiling.machine_peak import MachinePeak, measure_peak
from edgeprune.runtimes.profiling.measuring import Run, measure
from edgeprune.runtimes.profiling.memory import MemoryRequest, measure_memory
from edgeprune.runtimes.profiling.prediction import predict
from edgeprune.runtimes.profiling.report import (
    FORMAT_VERSION,
    BundleEntry,
    EnergyEntry,
    ProfileReport,
    SettingsEntry,
)
from edgeprune.runtimes.profiling.samples import DRAWN, SampleSet
from edgeprune.runtimes.session import Session, open_session
from edgeprune.targets import Target, find_target

# Bundles are of one model if these agree; what pruning changes (tokens in the tower and behind it) may differ.
_MODEL_FIELDS = tuple(
    field.name
    for field in fields(GeometryEntry)
    if field.name not in ("tokens_per_tile", "tokens_per_image", "vision_tokens")
)
_OVERLAYS = 4


class ProfileProgress(Protocol):
    """Hears what is measured."""

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """``done`` of ``steps`` steps of ``name`` are done."""


@dataclass(frozen=True)
class ProfileOptions:
    """How a profile is measured.

    Attributes:
        runs: Rounds that count.
        warmup: Rounds before them.
        max_new_tokens: Tokens of every answer.
        backend: As :func:`edgeprune.open_session` takes it.
        provider: As :func:`edgeprune.open_session` takes it.
        threads: As :func:`edgeprune.open_session` takes it.
        targets: Devices to predict.
        precision: Of the weights there; None chooses.
    """

    runs: int = 20
    warmup: int = 1
    max_new_tokens: int = 16
    backend: str = "onnxruntime"
    provider: str | None = None
    threads: int | None = None
    targets: tuple[str, ...] = ()
    precision: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warmup", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ProfileError(f"--{option} is {getattr(self, name)}: give at least {least}")
        if self.precision is not None and not self.targets:
            raise ProfileError("--precision is that of a prediction: name a device with --target")


@dataclass(frozen=True)
class Profile:
    """A report with what is too large for it.

    Attributes:
        report: The numbers.
        runs: Of every bundle, with all their spans.
        overlays: Kept tokens of a few pictures of the first bundle, each with a title; none where nothing is dropped
            in the decoder.
    """

    report: ProfileReport
    runs: tuple[tuple[Run, ...], ...]
    overlays: tuple[tuple[str, Image.Image], ...]


def profile(
    bundle: str | Path,
    samples: SampleSet,
    *,
    against: Sequence[str | Path] = (),
    options: ProfileOptions | None = None,
    progress: ProfileProgress | None = None,
) -> Profile:
    """Measure a bundle, others in turns with it, and what the machine could do.

    Args:
        bundle: The bundle.
        samples: What is asked (:mod:`edgeprune.runtimes.profiling.samples`).
        against: Other bundles of the same model, as a rule the unpruned one.
        options: How.
        progress: Hears what is done; where it raises, measuring ends.

    Raises:
        ProfileError: The bundles are of different models.
        TargetError: A target is unknown, or has no known rate in the precision.
        BundleError: A bundle is unusable.
        BackendError: The backend cannot run here.
        PictureError: A picture is unusable.
        PromptError: A prompt does not fit.
    """
    options = options or ProfileOptions()
    paths = [Path(bundle), *map(Path, against)]
    manifests = [Bundle.open(path).manifest for path in paths]
    _check_same_model(paths, manifests)
    targets = [_checked_target(name, options.precision, manifests[0]) for name in options.targets]
    names = _names(paths)
    chosen = samples.samples[: options.runs]
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                open_session(
                    path, backend=options.backend, provider=options.provider, threads=options.threads
                )
            )
            for path in paths
        ]
        peak = _peak(sessions[0], manifests[0].dtype)
        sensor = stack.enter_context(PowerSensor())
        rounds = options.runs + options.warmup

        def at_round(index: int) -> None:
            if progress is not None:
                step = "warm-up" if index < options.warmup else f"run {index - options.warmup + 1}"
                progress.graph("profile", step, index, rounds)

        runs = measure(
            sessions,
            chosen,
            runs=options.runs,
            warmup=options.warmup,
            max_new_tokens=options.max_new_tokens,
            at_round=at_round,
        )
        if peak is not None:
            # A machine that was busy at the start may be itself now.
            peak = peak.best_of(measure_peak(_onnxruntime(sessions[0]), manifests[0].dtype))
        overlays = _overlays(sessions[0], samples, runs[0])
        backend_name = sessions[0].backend.name
    rates = None if peak is None else peak.rates
    costs = [[run_costs(manifest, run) for run in own] for manifest, own in zip(manifests, runs, strict=True)]
    entries: list[BundleEntry] = []
    for index, name in enumerate(names):
        if progress is not None:
            progress.graph("profile", f"memory of {name}", rounds, rounds + 1)
        memory = measure_memory(_memory_request(paths[index], options), chosen[0])
        power = _energy(sensor, runs[index])
        entries.append(bundle_entry(name, manifests[index], runs[index], costs[index], rates, memory, power))
    comparisons = [
        entry
        for index in range(1, len(paths))
        for entry in compare(names[index], runs[0], runs[index], costs[0], costs[index], rates)
    ]
    by_name = dict(zip(names, zip(manifests, runs, costs, strict=True), strict=True))
    if progress is not None:
        progress.graph("profile", f"{options.runs} runs of {len(paths)} bundles", rounds + 1, rounds + 1)
    report = ProfileReport(
        format_version=FORMAT_VERSION,
        edgeprune_version=edgeprune.__version__,
        created=dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        machine=describe_machine(backend_name),
        board_state=dict(sensor.state),
        peak=peak,
        knee_tokens=None if rates is None else rates.knee_tokens,
        settings=SettingsEntry(
            runs=options.runs,
            warmup=options.warmup,
            max_new_tokens=options.max_new_tokens,
            samples=samples.kind,
            prompts=tuple(sample.name for sample in chosen),
            left_out=samples.left_out + len(samples.samples) - len(chosen),
            backend=backend_name,
            threads=options.threads,
        ),
        bundles=tuple(entries),
        comparisons=tuple(comparisons),
        predictions=tuple(predict(target, options.precision, by_name) for target in targets),
        notes=_notes(samples, options, manifests, names, rates),
    )
    return Profile(report, tuple(tuple(own) for own in runs), overlays)


def _check_same_model(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for path, manifest in zip(paths[1:], manifests[1:], strict=True):
        different = [
            name
            for name in _MODEL_FIELDS
            if getattr(manifest.geometry, name) != getattr(first.geometry, name)
        ]
        if manifest.source.model_type != first.source.model_type:
            different.insert(0, "model_type")
        if different:
            raise ProfileError(
                f"{path} is of another model than {paths[0]} ({', '.join(different[:4])} differ): "
                "compare exports of one checkpoint"
            )


def _checked_target(name: str, precision: str | None, manifest: Manifest) -> Target:
    """A target that can be predicted; said before anything is measured."""
    target = find_target(name)
    target_rates(target, precision or default_precision(target, manifest.dtype))
    return target


def _memory_request(path: Path, options: ProfileOptions) -> MemoryRequest:
    return MemoryRequest(path, options.backend, options.provider, options.threads, options.max_new_tokens)


def _energy(sensor: PowerSensor, runs: Sequence[Run]) -> EnergyEntry | None:
    intervals = [(run.started, run.started + run.total_ms / 1000) for run in runs]
    return energy(sensor.readings, intervals, tokens=sum(1 + len(run.decode_ms) for run in runs))


def _names(paths: Sequence[Path]) -> list[str]:
    """Names of the folders, with a number behind those that came before."""
    names: list[str] = []
    for path in paths:
        base = name = path.resolve().name
        number = 1
        while name in names:
            number += 1
            name = f"{base} ({number})"
        names.append(name)
    return names


def _onnxruntime(session: Session) -> OnnxRuntimeBackend:
    backend = session.backend
    if not isinstance(backend, OnnxRuntimeBackend):
        raise TypeError(f"{backend.name} is not ONNX Runtime")
    return backend


def _peak(session: Session, dtype: str) -> MachinePeak | None:
    """The machine's peak; only ONNX Runtime runs a graph that nobody has built engines for."""
    if not isinstance(session.backend, OnnxRuntimeBackend):
        return None
    return measure_peak(session.backend, dtype)


def _overlays(
    session: Session, samples: SampleSet, runs: Sequence[Run]
) -> tuple[tuple[str, Image.Image], ...]:
    found: list[tuple[str, Image.Image]] = []
    first_of = {run.sample: run for run in reversed(runs)}
    for index in sorted(first_of)[:_OVERLAYS]:
        sample, answer = samples.samples[index], first_of[index].answer
        if answer.sites and sample.pictures:
            title = sample.name if sample.name == sample.prompt else f"{sample.name}: {sample.prompt}"
            found.append((title, session.overlay(sample.pictures[0], answer)))
    return tuple(found)


def _notes(
    samples: SampleSet,
    options: ProfileOptions,
    manifests: Sequence[Manifest],
    names: Sequence[str],
    rates: Rates | None,
) -> tuple[str, ...]:
    notes: list[str] = []
    if samples.kind == DRAWN:
        notes.append(
            "The pictures were drawn (noise and shapes), because none were given: how many tokens are kept of "
            "photographs is another number. Give your own with --data or --image."
        )
    if samples.unusable:
        notes.append(f"{samples.unusable} entries of the data cannot be used and were passed over.")
    if options.runs < 20:
        notes.append("Of fewer than 20 runs, p95 and p99 are close to the slowest; 100 runs tell them apart.")
    for name, manifest in zip(names[1:], manifests[1:], strict=True):
        if manifest.source.sha256 != manifests[0].source.sha256:
            notes.append(
                f"{name} was exported from other files than {names[0]} (same sizes, another sha256): "
                "is it the same model?"
            )
        if manifest.dtype != manifests[0].dtype:
            notes.append(f"{name} is {manifest.dtype} and {names[0]} {manifests[0].dtype}.")
    if len(manifests) == 1:
        notes.append("Saving efficiency needs the unpruned bundle beside this one: --against.")
    elif not any(not manifest.pruning for manifest in manifests[1:]):
        notes.append("None of the bundles to compare with is unpruned: savings are relative to pruned ones.")
    if rates is None:
        notes.append(
            "The machine's peak was not measured: only ONNX Runtime runs graphs without built engines."
        )
    return tuple(notes)
