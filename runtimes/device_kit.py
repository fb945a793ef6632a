"""What to carry to a device whose engines must be built there: graphs, the exact ``trtexec`` lines, checksums."""

import shlex
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgeprune.bundle import sha256_of, writing
from edgeprune.errors import BundleError, EngineError
from edgeprune.manifest import MANIFEST_FILE, GraphEntry, ProfileEntry, TensorEntry
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_build import BuildPlan, plan_build
from edgeprune.runtimes.engine_builder import input_range
from edgeprune.runtimes.engine_profiles import AUTO, ONE
from edgeprune.runtimes.engine_store import ENGINES_FOLDER
from edgeprune.runtimes.kit_plugin import PLUGIN_SUFFIX, KitPlugin, plan_plugin, plugin_files
from edgeprune.runtimes.tensorrt_library import FUSED_OPSET, FUSED_TENSORRT

BUILD_SCRIPT, CHECKSUMS, README = "build.sh", "SHA256SUMS", "README.md"
# Segments have layers of equal sizes, whose kernels trtexec then times once.
TIMINGS = "timing.cache"
BUNDLE_FOLDER = "bundle"


def write_kit(bundle: str | Path, output: str | Path, options: BuildOptions) -> int:
    """Write the kit of a target; arguments as in :func:`edgeprune.runtimes.engine_build.build`.

    With the profiles "auto" the device cannot compare two builds by itself, so the kit takes those that need least.

    Returns:
        The number of files.

    Raises:
        EngineError: The folder exists, or the profiles do not fit.
        TargetError: The target lacks the bundle's precision.
        BundleError: The bundle is unusable, or the folder cannot be written.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EngineError(f"{folder} exists and is not empty: choose another folder for the kit")
    if options.profile_choice == AUTO:
        options = replace(options, profile_choice=ONE)
    plan = plan_build(bundle, options)
    (by_graph,) = plan.candidates.values()
    plugin = plan_plugin(options.plugin, plan.target, plan.bundle, by_graph)
    with writing(folder) as partial:
        carried = partial / BUNDLE_FOLDER
        _copy(plan.bundle.path, MANIFEST_FILE, carried)
        for entry in plan.bundle.manifest.files():
            _copy(plan.bundle.path, entry.path, carried)
        for path, content in plugin_files(plugin, plan.bundle).items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
        script = partial / BUILD_SCRIPT
        script.write_text(build_script(plan, plugin, by_graph), encoding="utf-8")
        script.chmod(0o755)
        (partial / README).write_text(_readme(plan, plugin), encoding="utf-8")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        lines = [f"{sha256_of(path)}  {path.relative_to(partial).as_posix()}" for path in files]
        (partial / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(files) + 1


def trtexec_arguments(
    graph: GraphEntry, profiles: Sequence[ProfileEntry], *, workspace: int | None = None
) -> list[str]:
    """What ``trtexec`` is told of one graph, besides its files."""
    arguments = ["--stronglyTyped", "--skipInference"]
    if workspace is not None:
        arguments.append(f"--memPoolSize=workspace:{max(1, workspace // 2**20)}M")
    for index, profile in enumerate(profiles):
        shapes = {tensor.name: _shapes(tensor, profile.ranges) for tensor in graph.inputs}
        given = {name: sizes for name, sizes in shapes.items() if sizes is not None}
        if not given:
            continue
        if len(profiles) > 1:
            arguments.append(f"--profile={index}")
        for kind, place in (("min", 0), ("opt", 1), ("max", 2)):
            text = ",".join(f"{name}:{sizes[place]}" for name, sizes in given.items())
            arguments.append(f"--{kind}Shapes={text}")
    return arguments


def build_script(plan: BuildPlan, plugin: KitPlugin, by_graph: Mapping[str, tuple[ProfileEntry, ...]]) -> str:
    """The shell script that builds every graph of a plan."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Builds the {plan.precision} engines of this kit on {plan.target.title}. Engines that are whole are kept.",
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        "TRTEXEC=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}",
        'if [ ! -x "$TRTEXEC" ]; then',
        '    echo "trtexec is missing: install TensorRT from JetPack, or set TRTEXEC to its path" >&2',
        "    exit 1",
        "fi",
        f"sha256sum --quiet --check {CHECKSUMS} || {{",
        '    echo "a file of the kit is damaged: copy the kit again" >&2',
        "    exit 1",
        "}",
        f"OUT={BUNDLE_FOLDER}/{ENGINES_FOLDER}/{plan.target.name}",
        'mkdir -p "$OUT"',
        *plugin.script(),
        "build() {",
        "    local graph=$1",
        "    shift",
        '    if [ -s "$OUT/$graph.engine" ]; then',
        '        echo "$graph: built before"',
        "        return",
        "    fi",
        f"    local onnx={BUNDLE_FOLDER}/$graph.onnx plugins=() how=",
        f'    if [ "$PLUGIN" != off ] && [ -f "{BUNDLE_FOLDER}/$graph{PLUGIN_SUFFIX}" ]; then',
        f'        onnx={BUNDLE_FOLDER}/$graph{PLUGIN_SUFFIX} how=" with the plugins"',
        '        plugins=("--dynamicPlugins=$PLUGIN")',
        "    fi",
        '    "$TRTEXEC" --onnx="$onnx" --saveEngine="$OUT/$graph.partial" "${plugins[@]}" \\',
        f'        --timingCacheFile={TIMINGS} "$@" \\',
        '        > "$OUT/$graph.log" 2>&1 || {',
        '        rm -f "$OUT/$graph.partial"',
        '        echo "$graph: trtexec failed, see $OUT/$graph.log" >&2',
        "        exit 1",
        "    }",
        '    mv "$OUT/$graph.partial" "$OUT/$graph.engine"',
        '    echo "$graph: built$how"',
        "}",
        "",
    ]
    for name, graph in plan.bundle.manifest.graphs.items():
        arguments = trtexec_arguments(graph, by_graph[name], workspace=plan.options.workspace_bytes)
        lines.append(" \\\n    ".join([f"build {name}", *(shlex.quote(word) for word in arguments)]))
    lines.append('echo "the engines are in $OUT"')
    return "\n".join(lines) + "\n"


def _shapes(tensor: TensorEntry, ranges: Mapping[str, tuple[int, ...]]) -> list[str] | None:
    """Least, tuned-for and greatest size as ``trtexec`` writes them; None where nothing is dynamic."""
    if tensor.name in ranges and not tensor.shape:
        return [str(size) for size in ranges[tensor.name]]
    if not any(isinstance(dim, str) for dim in tensor.shape):
        return None
    return ["x".join(str(size) for size in shape) for shape in input_range(tensor.shape, ranges)]


def _copy(source: Path, name: str, folder: Path) -> None:
    destination = folder / name
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source / name, destination)
    except OSError as error:
        raise BundleError(
            f"cannot copy {source / name} ({error.strerror or error}): free disk space or copy the bundle again"
        ) from error


def _readme(plan: BuildPlan, plugin: KitPlugin) -> str:
    manifest, target = plan.bundle.manifest, plan.target
    needed = target.tensorrt[0]
    if manifest.opset >= FUSED_OPSET:
        needed = max(needed, ".".join(str(part) for part in FUSED_TENSORRT), key=_version)
    opset = ""
    if _version(needed) > _version(target.tensorrt[0]):
        opset = (
            f"\nThis bundle has ONNX opset {manifest.opset}, which TensorRT reads from {needed} on. For TensorRT "
            f"{target.tensorrt[0]} export with `--opset 20` and write the kit again.\n"
        )
    return f"""# Engines for {target.title}

Engines of TensorRT run on the GPU and the TensorRT that built them, so these are built on the device.

1. Copy this folder to the device. About {plan.memory.run / 2**30:.1f} GiB must be free there to run, about
   {plan.memory.build / 2**30:.1f} GiB to build; on a board with little memory add swap and close the desktop.
2. TensorRT {needed} to {target.tensorrt[1]}.x must be installed (on a Jetson it comes with JetPack), with `trtexec`.
3. Run `./{BUILD_SCRIPT}`. It checks `{CHECKSUMS}`, then builds one engine per graph into
   `{BUNDLE_FOLDER}/{ENGINES_FOLDER}/{target.name}/`, with a log beside each, and keeps what it timed in `{TIMINGS}`. It
   may be interrupted and run again.
{opset}
The engines are {plan.precision}, strongly typed, for prompts of up to {plan.limits.sequence} tokens with
{plan.limits.images} pictures.

{textwrap.fill(plugin.readme(), 120, break_on_hyphens=False, break_long_words=False)}

Neither these lines nor the engines have been run on this device by whoever wrote the kit. Where edgeprune is installed
on the device, `edgeprune build {BUNDLE_FOLDER} --target {target.name}` does the same and enters the engines into
`{BUNDLE_FOLDER}/{MANIFEST_FILE}`, which this script does not.
"""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
