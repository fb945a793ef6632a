"""Engines of a random LLaVA of about 0.4 B parameters: sizes, seconds, memory, copies of the weights.

    python benchmarks/engines.py [--workdir DIR] [--targets rtx30,rtx40,rtx50] [--methods atp,ivtp,adaptprune]

Exports the checkpoint in float16 with each method and builds every graph for every target with TensorRT for RTX, which
needs no GPU: once with one profile per graph, once with profiles for prefill and decode. Each build is a process of its
own, so that its peak memory is its own. Prints Markdown; nothing is executed. Fails where an engine cannot be built, or
where a bundle's engines hold its weights more than once.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine import describe_machine
from process_memory import own_memory
from random_llava import FEW_LAYERS, write_random_clip, write_random_llava, write_random_thresholds

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.export.exporter import export
from edgeprune.export.progress import ProgressBars
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.atp import Atp
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import PruningMethod
from edgeprune.runtimes.build_options import BuildOptions
from edgeprune.runtimes.engine_build import build, plan_build
from edgeprune.runtimes.engine_profiles import ONE, SPLIT
from edgeprune.runtimes.external_weights import external_bytes

METHODS: dict[str, PruningMethod] = {
    "atp": Atp(layers=(2, 3, 5), hidden_width=8),
    "ivtp": Ivtp(decoder_layers=4, group_size=2),
    "adaptprune": AdaptPrune(layer=2),
}


# Engines' bytes by the weights' bytes. Code adds 2 to 5 % here; a second copy of the largest segment alone adds 27 %.
MOST_COPIES = 1.1


@dataclass(frozen=True)
class Built:
    """What one build measured.

    Attributes:
        seconds: By graph.
        engine_bytes: By graph.
        peak_bytes: Of the process.
    """

    seconds: dict[str, float]
    engine_bytes: dict[str, int]
    peak_bytes: int


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = _arguments()
    if arguments.build is not None:
        bundle, target, strategy = arguments.build
        _build_here(Path(bundle), target, strategy)
        return
    if arguments.workdir is not None:
        _measure(arguments.workdir, arguments.methods.split(","), arguments.targets.split(","))
        return
    with tempfile.TemporaryDirectory() as workdir:
        _measure(Path(workdir), arguments.methods.split(","), arguments.targets.split(","))


def _measure(workdir: Path, methods: list[str], targets: list[str]) -> None:
    _prepare(workdir, methods)
    print(describe_machine())
    repeated: list[str] = []
    for name in methods:
        weights = _weights(workdir / name)
        print(f"\n{name}: {sum(weights.values()) / 1e6:.0f} MB of weights, {len(weights)} graphs\n")
        print(
            "| target | profiles | engines MB | copies of the weights | estimated weights MB | s | peak MB |"
        )
        print("|---|---|---|---|---|---|---|")
        detail: dict[tuple[str, str], Built] = {}
        for target in targets:
            for strategy in (ONE, SPLIT):
                built = _build_apart(workdir / name, target, strategy)
                detail[target, strategy] = built
                options = BuildOptions(target, profile_choice=strategy)
                estimated = plan_build(workdir / name, options).memory.weights
                size = sum(built.engine_bytes.values())
                copies = size / sum(weights.values())
                if copies > MOST_COPIES:
                    repeated.append(f"{name} for {target}, {strategy}")
                print(
                    f"| {target} | {strategy} | {size / 1e6:.1f} | {copies:.2f} "
                    f"| {estimated / 1e6:.1f} | {sum(built.seconds.values()):.1f} | {built.peak_bytes / 1e6:.0f} |",
                    flush=True,
                )
        print(f"\n| graph | weights MB | {' | '.join(f'{t}, {s}' for t, s in detail)} |")
        print("|---" * (len(detail) + 2) + "|")
        for graph, size in weights.items():
            cells = [
                f"{built.engine_bytes[graph] / 1e6:.1f} MB, {built.seconds[graph]:.1f} s"
                for built in detail.values()
            ]
            print(f"| `{graph}` | {size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)
    if repeated:
        sys.exit(f"engines with more than {MOST_COPIES} copies of the weights: {'; '.join(repeated)}")


def _prepare(workdir: Path, methods: list[str]) -> None:
    """Write the checkpoint and its bundles where they are missing."""
    checkpoint, clip = workdir / "checkpoint", workdir / "clip"
    if not (checkpoint / "pruning.safetensors").is_file():
        write_random_clip(clip, FEW_LAYERS, write_random_llava(checkpoint, FEW_LAYERS))
        geometry = load_checkpoint(checkpoint, methods=()).model.config.geometry
        atp = METHODS["atp"]
        assert isinstance(atp, Atp)
        write_random_thresholds(checkpoint, atp, geometry)
    for name in methods:
        if not (workdir / name).is_dir():
            with ProgressBars() as progress:
                export(
                    checkpoint,
                    workdir / name,
                    methods=[METHODS[name]],
                    clip=clip,
                    dtype="float16",
                    progress=progress,
                )


def _weights(bundle: Path) -> dict[str, int]:
    opened = Bundle.open(bundle)
    return {name: external_bytes(opened.file(graph.file)) for name, graph in opened.manifest.graphs.items()}


def _build_apart(bundle: Path, target: str, strategy: str) -> Built:
    command = [sys.executable, __file__, "--build", str(bundle), target, strategy]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Built(**json.loads(result.stdout.splitlines()[-1]))


def _build_here(bundle: Path, target: str, strategy: str) -> None:
    try:
        engines = build(bundle, BuildOptions(target, profile_choice=strategy)).engines
    finally:
        # Gigabytes that nobody reads again; the manifest is of no use to the next build either way.
        shutil.rmtree(bundle / "engines", ignore_errors=True)
    peak = own_memory("VmHWM")
    seconds = {name: entry.seconds for name, entry in engines.items()}
    sizes = {name: entry.file.bytes for name, entry in engines.items()}
    print(json.dumps({"seconds": seconds, "engine_bytes": sizes, "peak_bytes": peak}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="keep checkpoint and bundles here (4 GB) and reuse them")
    parser.add_argument("--targets", default="rtx30,rtx40,rtx50", help="targets to build for")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to export with")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
