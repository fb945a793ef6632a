"""Which engines of a bundle run here, and which of an engine's profiles takes an input: plain functions of data."""

from collections.abc import Mapping, Sequence
from math import prod

from edgeprune import tensor_names as names
from edgeprune.errors import BackendError
from edgeprune.manifest import EngineSetEntry, GraphEntry, Manifest, ProfileEntry
from edgeprune.runtimes.backend import DeviceTensor

_BUILD = "edgeprune build BUNDLE --target this"
_BY_SEQUENCE = (
    "sequence",
    "past",
    "past + sequence",
    "prompt",
    "kept",
    "text_rows",
    "context_rows",
    "visual_tokens",
    names.NUM_KEEP,
)


def choose_engines(manifest: Manifest, sm: int, installed: Mapping[str, str]) -> tuple[str, EngineSetEntry]:
    """The engines that this machine can run, with the name of their target.

    Args:
        manifest: Of the bundle.
        sm: Compute capability of the GPU.
        installed: Version by name of the TensorRT that is installed: "tensorrt", "tensorrt_rtx" or both.

    Raises:
        BackendError: There are none; the message says what there is instead, and the remedy.
    """
    if not manifest.engines:
        raise BackendError(f"the bundle has no engines: {_BUILD}")
    # By name, because a C++ map is in this order: both runtimes take the same set.
    sets = sorted(manifest.engines.items())
    here = {name: entry for name, entry in sets if entry.sm == sm}
    if not here:
        there = ", ".join(f"{name} (SM {entry.sm})" for name, entry in sets)
        raise BackendError(f"the bundle has engines for {there}, and this GPU is SM {sm}: {_BUILD}")
    fitting = {
        name: entry for name, entry in here.items() if installed.get(entry.builder) == entry.tensorrt_version
    }
    if not fitting:
        name, entry = next(iter(here.items()))
        have = ", ".join(f"{builder} {version}" for builder, version in installed.items()) or "none"
        raise BackendError(
            f"the engines '{name}' are of {entry.builder} {entry.tensorrt_version}, and an engine runs with the very "
            f"version that built it; installed is {have}: {_BUILD}, or install {entry.builder}=="
            f"{entry.tensorrt_version}"
        )
    current = {name: entry for name, entry in fitting.items() if _is_current(manifest, entry)}
    if not current:
        raise BackendError(
            f"the engines '{next(iter(fitting))}' were built from other graphs than the bundle has now: {_BUILD}"
        )
    return next(iter(current.items()))


def _is_current(manifest: Manifest, entry: EngineSetEntry) -> bool:
    return all(
        name in entry.engines and entry.engines[name].onnx_sha256 == graph.file.sha256
        for name, graph in manifest.graphs.items()
    )


def longest_sequence(manifest: Manifest, engines: EngineSetEntry) -> int | None:
    """Most rows of a prompt with its answer that the engines take; None for a decoder without a cache.

    The first segment with a cache sees every row; behind a site there are fewer.
    """
    for segment in manifest.segments:
        profiles = engines.engines[segment.graph].profiles
        cached = [profile.ranges["past"][2] for profile in profiles if "past" in profile.ranges]
        if cached:
            return max(cached) + 1
    return None


def dimension_places(graph: GraphEntry) -> dict[str, tuple[str, int | None]]:
    """Where the size of every dynamic dimension can be read: an input and its axis; of a value, the input alone."""
    places: dict[str, tuple[str, int | None]] = {}
    for tensor in graph.inputs:
        if tensor.name == names.NUM_KEEP:
            places[tensor.name] = (tensor.name, None)
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str):
                places.setdefault(dim, (tensor.name, axis))
    return places


def dimension_sizes(
    places: Mapping[str, tuple[str, int | None]],
    inputs: Mapping[str, DeviceTensor],
    values: Mapping[str, int],
) -> dict[str, int]:
    """The size of every dynamic dimension.

    Args:
        places: From :func:`dimension_places`.
        inputs: The inputs.
        values: Of the inputs whose value is a size.
    """
    return {
        dim: values[name] if axis is None else inputs[name].shape[axis]
        for dim, (name, axis) in places.items()
    }


def choose_profile(graph: str, profiles: Sequence[ProfileEntry], sizes: Mapping[str, int]) -> int:
    """The index of the smallest profile that takes the sizes.

    A profile is the smaller, the fewer elements its greatest sizes have: TensorRT tunes within its range, and a
    smaller range is closer to what runs.

    Args:
        graph: Name of the graph, for the message.
        profiles: In the order of the engine.
        sizes: By dimension.

    Raises:
        BackendError: None does; the message names dimension, size, range and remedy.
    """
    fitting = [
        index
        for index, profile in enumerate(profiles)
        if all(least <= sizes[dim] <= greatest for dim, (least, _, greatest) in profile.ranges.items())
    ]
    if fitting:
        return min(fitting, key=lambda index: prod(max(1, r[2]) for r in profiles[index].ranges.values()))
    raise BackendError(_outside(graph, profiles, sizes))


def _outside(graph: str, profiles: Sequence[ProfileEntry], sizes: Mapping[str, int]) -> str:
    """Names the dimension that most profiles fail on."""
    misses = {
        dim: sum(
            not profile.ranges[dim][0] <= size <= profile.ranges[dim][2]
            for profile in profiles
            if dim in profile.ranges
        )
        for dim, size in sizes.items()
    }
    dim = max(misses, key=lambda name: misses[name])
    ranges = " or ".join(
        dict.fromkeys(f"{p.ranges[dim][0]} … {p.ranges[dim][2]}" for p in profiles if dim in p.ranges)
    )
    option = "--max-sequence" if dim in _BY_SEQUENCE else "--max-images"
    return (
        f"{graph}: {dim} is {sizes[dim]}, the engine was built for {ranges}: build with a larger {option}, or with a "
        f"file of --profiles, or ask about less"
    )
