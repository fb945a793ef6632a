"""Bundle → engines for a target, inside the bundle."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.manifest import EngineEntry, EngineSetEntry, Manifest, ProfileEntry
from edgeprune.precision import engine_precision
from edgeprune.runtimes.engine_builder import BuildProgress, build_engine
from edgeprune.runtimes.engine_memory import MemoryEstimate, check_buildable, check_fits, estimate
from edgeprune.runtimes.engine_profiles import (
    AUTO,
    FILE,
    ONE,
    SPLIT,
    STRATEGIES,
    Limits,
    parse_profile_file,
    profiles,
)
from edgeprune.runtimes.engine_store import EngineStore, combined_key, engine_key
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary, library_for
from edgeprune.targets import Target, find_target

# Raised when the same inputs must give other engines.
_BUILDER_VERSION = 1
_Profiles = Mapping[str, tuple[ProfileEntry, ...]]


@dataclass(frozen=True)
class BuildPlan:
    """What is built, for whom and with which profiles.

    Attributes:
        bundle: The bundle.
        target: The device.
        precision: Of weights and activations.
        limits: The largest prompts.
        candidates: Profiles of every graph by strategy; the first that fits is taken.
        memory: What the last candidate, the one that needs least, needs.
        device_bytes: Memory of the device, where it differs from the target's.
    """

    bundle: Bundle
    target: Target
    precision: str
    limits: Limits
    candidates: Mapping[str, _Profiles]
    memory: MemoryEstimate
    device_bytes: int | None


def plan_build(
    bundle: str | Path,
    target: str,
    *,
    precision: str | None = None,
    profile_choice: str | Path = AUTO,
    max_images: int | None = None,
    max_sequence: int | None = None,
    memory_gib: float | None = None,
) -> BuildPlan:
    """Check everything that can be checked before building; arguments as in :func:`build`."""
    device = find_target(target)
    if precision is not None:
        device.check_precision(precision)
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    precision = engine_precision(manifest, device, precision)
    limits = Limits.of(manifest, max_images, max_sequence)
    candidates = _candidates(manifest, limits, profile_choice)
    least = list(candidates.values())[-1]
    need = estimate(manifest, limits, {name: len(entries) for name, entries in least.items()})
    device_bytes = None if memory_gib is None else int(memory_gib * 2**30)
    if device_bytes is not None and device_bytes < 1:
        raise EngineError(f"--memory is {memory_gib}: give the device's memory in GiB")
    check_fits(need, device, device_bytes)
    return BuildPlan(opened, device, precision, limits, candidates, need, device_bytes)


def build(
    bundle: str | Path,
    target: str,
    *,
    precision: str | None = None,
    profile_choice: str | Path = AUTO,
    max_images: int | None = None,
    max_sequence: int | None = None,
    workspace: int | None = None,
    memory_gib: float | None = None,
    progress: BuildProgress | None = None,
) -> EngineSetEntry:
    """Build the engines of a bundle for a target and put them into it.

    Engines that are there already and were built from the same things are taken as they are.

    Args:
        bundle: Folder of the bundle.
        target: Name of the target, see :func:`edgeprune.targets.targets`.
        precision: Of weights and activations; the bundle's own by default.
        profile_choice: "auto", "one", "split", or a file of profiles (:mod:`edgeprune.runtimes.engine_profiles`).
        max_images: Most typical pictures in a prompt.
        max_sequence: Most rows of a prompt with its answer; the model's context by default.
        workspace: Most bytes of scratch memory per layer.
        memory_gib: Memory of the device, where it is another than the target's.
        progress: Hears what is done; where it raises, building ends and the bundle keeps its old engines.

    Raises:
        TargetError: The target is unknown or lacks the precision.
        EngineError: TensorRT is missing or refuses something, profiles are unusable, or memory is too small.
        BundleError: The bundle is unusable.
    """
    plan = plan_build(
        bundle,
        target,
        precision=precision,
        profile_choice=profile_choice,
        max_images=max_images,
        max_sequence=max_sequence,
        memory_gib=memory_gib,
    )
    if workspace is not None and workspace < 1:
        raise EngineError(f"--workspace is {workspace} bytes: give at least one MiB")
    library = library_for(plan.target)
    library.check_opset(plan.bundle.manifest.opset)
    check_buildable(plan.memory)
    store = EngineStore(plan.bundle, plan.target.name)
    before = plan.bundle.manifest.engines.get(plan.target.name)
    keys = {
        strategy: {name: _key(plan, library, name, entries, workspace) for name, entries in by_graph.items()}
        for strategy, by_graph in plan.candidates.items()
    }
    key = combined_key({"engines": keys, "device_bytes": plan.device_bytes})
    # What was chosen before is chosen again; the other strategy's engines are gone and need not be built for that.
    known = before if before is not None and before.key == key else None
    built = {
        strategy: {
            name: _engine(
                plan, store, library, name, by_graph[name], keys[strategy][name], workspace, progress
            )
            for name in plan.bundle.manifest.graphs
        }
        for strategy, by_graph in plan.candidates.items()
        if known is None or strategy == known.strategy
    }
    sizes = {
        strategy: sum(entry.file.bytes for entry in engines.values()) for strategy, engines in built.items()
    }
    chosen = _choose(plan, sizes)
    engines = EngineSetEntry(
        key=key,
        builder=library.name,
        tensorrt_version=library.version,
        sm=plan.target.sm,
        precision=plan.precision,
        plugin_version=None,
        strategy=chosen,
        strategy_bytes=sizes if known is None else known.strategy_bytes,
        engines=built[chosen],
    )
    if before != engines:
        store.publish(engines)
    return engines


def _key(
    plan: BuildPlan,
    library: TensorRtLibrary,
    name: str,
    entries: tuple[ProfileEntry, ...],
    workspace: int | None,
) -> str:
    return engine_key(
        plan.bundle.manifest.graphs[name],
        entries,
        builder=library.name,
        tensorrt=library.version,
        sm=plan.target.sm,
        plugin=None,
        precision=plan.precision,
        workspace=workspace,
        version=_BUILDER_VERSION,
    )


def _engine(
    plan: BuildPlan,
    store: EngineStore,
    library: TensorRtLibrary,
    name: str,
    entries: tuple[ProfileEntry, ...],
    key: str,
    workspace: int | None,
    progress: BuildProgress | None,
) -> EngineEntry:
    graph = plan.bundle.manifest.graphs[name]
    label = f"{name} ({len(entries)} profile{'s' * (len(entries) > 1)})"
    found = store.find(name, key)
    if found is not None:
        if progress is not None:
            progress.graph(label, f"{found.file.bytes / 1e6:.1f} MB, built before", 1, 1)
        return found

    def step(what: str, done: int, steps: int) -> None:
        if progress is not None:
            # The last step is ours, after the file is written.
            progress.graph(label, what, min(done, steps), steps + 1)

    started = time.perf_counter()
    step("parse", 0, 1)
    path = plan.bundle.file(graph.file)
    engine = build_engine(library, path, graph, entries, sm=plan.target.sm, workspace=workspace, step=step)
    entry = store.add(name, key, engine.data, entries, time.perf_counter() - started)
    if progress is not None:
        progress.graph(label, f"{entry.file.bytes / 1e6:.1f} MB in {entry.seconds:.1f} s", 1, 1)
    return entry


def _choose(plan: BuildPlan, sizes: Mapping[str, int]) -> str:
    """The first strategy whose engines fit the device beside caches and activations; else the last, the smallest."""
    device = plan.target
    usable = device.usable_bytes
    if plan.device_bytes is not None:
        usable += plan.device_bytes - device.memory_bytes
    beside = plan.memory.run - plan.memory.weights
    for strategy, size in sizes.items():
        if size + beside <= usable:
            return strategy
    return list(sizes)[-1]


def _candidates(manifest: Manifest, limits: Limits, choice: str | Path) -> dict[str, _Profiles]:
    if choice == AUTO:
        return {SPLIT: profiles(manifest, limits, SPLIT), ONE: profiles(manifest, limits, ONE)}
    if choice in (ONE, SPLIT):
        return {str(choice): profiles(manifest, limits, str(choice))}
    path = Path(choice)
    if not path.exists():
        raise EngineError(
            f"--profiles '{choice}' is neither a file nor one of {', '.join(STRATEGIES)}: give one of these"
        )
    return {FILE: parse_profile_file(path, manifest, limits)}
