"""Bundle → engines for a target, inside the bundle."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.manifest import EngineEntry, EngineSetEntry, Manifest, ProfileEntry
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_builder import BuildProgress, build_engine
from edgeprune.runtimes.engine_memory import MemoryEstimate, MemoryModel, check_buildable
from edgeprune.runtimes.engine_plugin import EnginePlugin, choose_plugin
from edgeprune.runtimes.engine_precision import engine_precision
from edgeprune.runtimes.engine_profiles import (
    AUTO,
    FILE,
    ONE,
    SPLIT,
    STRATEGIES,
    Limits,
    parse_profile_file,
    profiles,
    weight_copies,
)
from edgeprune.runtimes.engine_store import EngineStore, combined_key, engine_key
from edgeprune.runtimes.memory_remedies import check_fits
from edgeprune.runtimes.tensorrt_library import TensorRtLibrary, library_for
from edgeprune.runtimes.timing_cache import TimingCache, timing_cache_of
from edgeprune.targets import Target

# Raised when the same inputs must give other engines.
_BUILDER_VERSION = 1
_Profiles = Mapping[str, tuple[ProfileEntry, ...]]


@dataclass(frozen=True)
class BuildPlan:
    """What is built, for whom and with which profiles.

    Attributes:
        bundle: The bundle.
        options: What was asked for.
        target: The device.
        precision: Of weights and activations.
        limits: The largest prompts.
        candidates: Profiles of every graph by strategy; the first that fits is taken.
        memory: What the last candidate, the one that needs least, needs.
    """

    bundle: Bundle
    options: BuildOptions
    target: Target
    precision: str
    limits: Limits
    candidates: Mapping[str, _Profiles]
    memory: MemoryEstimate


def plan_build(bundle: str | Path, options: BuildOptions) -> BuildPlan:
    """Check everything that can be checked before building; arguments as in :func:`build`."""
    device = options.device
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    precision = engine_precision(manifest, device, options.precision)
    limits = Limits.of(manifest, options.max_images, options.max_sequence)
    candidates = _candidates(manifest, limits, options.profile_choice)
    least = list(candidates.values())[-1]
    copies = {name: weight_copies(entries, rtx=device.rtx) for name, entries in least.items()}
    memory = MemoryModel.of(opened, limits, copies)
    check_fits(memory, device, options.usable_bytes)
    return BuildPlan(opened, options, device, precision, limits, candidates, memory.estimate())


def build(
    bundle: str | Path, options: BuildOptions, *, progress: BuildProgress | None = None
) -> EngineSetEntry:
    """Build the engines of a bundle for a target and put them into it.

    Engines that are there already and were built from the same things are taken as they are.

    Args:
        bundle: Folder of the bundle.
        options: For whom, and how large.
        progress: Hears what is done; where it raises, building ends and the bundle keeps its old engines.

    Raises:
        TargetError: The target lacks the bundle's precision.
        EngineError: TensorRT is missing or refuses something, profiles are unusable, memory is too small, or there is
            no plugin that fits where one was asked for.
        BundleError: The bundle is unusable.
    """
    plan = plan_build(bundle, options)
    library = library_for(plan.target)
    library.check_opset(plan.bundle.manifest.opset)
    check_buildable(plan.memory)
    warn = _unheard if progress is None else progress.warning
    candidates = tuple(plan.candidates.values())
    plugin = choose_plugin(options.plugin, library, plan.target.sm, plan.bundle, candidates, warn)
    timings = timing_cache_of(library, plan.target, warn)
    store = EngineStore(plan.bundle, plan.target.name)
    before = plan.bundle.manifest.engines.get(plan.target.name)
    keys = {
        strategy: {name: _key(plan, library, plugin, name, entries) for name, entries in by_graph.items()}
        for strategy, by_graph in plan.candidates.items()
    }
    key = combined_key({"engines": keys, "usable_bytes": options.usable_bytes})
    # What was chosen before is chosen again; the other strategy's engines are gone and need not be built for that.
    known = before if before is not None and before.key == key else None
    built = {
        strategy: {
            name: _engine(
                plan, store, library, plugin, name, by_graph[name], keys[strategy][name], timings, progress
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
        plugin_version=plugin.version,
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
    plugin: EnginePlugin,
    name: str,
    entries: tuple[ProfileEntry, ...],
) -> str:
    return engine_key(
        plan.bundle.manifest.graphs[name],
        entries,
        builder=library.name,
        tensorrt=library.version,
        sm=plan.target.sm,
        plugin=plugin.version_of(name),
        precision=plan.precision,
        workspace=plan.options.workspace_bytes,
        version=_BUILDER_VERSION,
    )


def _engine(
    plan: BuildPlan,
    store: EngineStore,
    library: TensorRtLibrary,
    plugin: EnginePlugin,
    name: str,
    entries: tuple[ProfileEntry, ...],
    key: str,
    timings: TimingCache | None,
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
    engine = build_engine(
        library,
        path,
        graph,
        entries,
        sm=plan.target.sm,
        workspace=plan.options.workspace_bytes,
        plugin=plugin.library if name in plugin.nodes else None,
        timings=timings,
        step=step,
    )
    entry = store.add(name, key, engine.data, entries, time.perf_counter() - started)
    if progress is not None:
        progress.graph(label, f"{entry.file.bytes / 1e6:.1f} MB in {entry.seconds:.1f} s", 1, 1)
    return entry


def _unheard(line: str) -> None:
    """Nobody listens."""


def _choose(plan: BuildPlan, sizes: Mapping[str, int]) -> str:
    """The first strategy whose engines fit the device beside caches and activations; else the last, the smallest."""
    usable = plan.options.usable_bytes
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
