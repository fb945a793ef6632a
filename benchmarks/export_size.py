"""Exporting a checkpoint as large as LLaVA-1.5-7B: peak memory, minutes by stage, size of the bundle, an answer.

    python benchmarks/export_size.py [--layers 32] [--vision-layers 24] [--scale 1] [--method fastv] [--workdir DIR]

Writes a random checkpoint with the shapes of LLaVA-1.5-7B (float16, sharded safetensors), exports it in float16 and
answers a prompt from the bundle, each in a process of its own. Fewer layers, and widths divided by --scale, make a
small trial. Targets: peak of the export ≤ 1.3 × weights + 2 GB, bundle ≤ 1.02 × weights. The peak is what was resident
at once (VmHWM), mapped files included; the column "of its own" is what the process holds beside those, which no machine
can take back. Whole, it needs 45 GB of disk. Linux only. Exits with 1 if a target is missed.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from machine import describe_machine, describe_versions
from PIL import Image
from process_memory import own_memory
from random_llava import LLAVA_7B, LlavaSize, write_random_shards

import edgeprune
from edgeprune.bundle import Bundle
from edgeprune.checkpoint_weights import weight_files
from edgeprune.export.exporter import export
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.fastv import FastV
from edgeprune.prune.method import PruningMethod

GB = 1e9
NEW_TOKENS = 4
METHODS: dict[str, list[PruningMethod]] = {
    "none": [],
    "fastv": [FastV(layer=1)],
    "adaptprune": [AdaptPrune(layer=1)],
}


def main() -> None:
    """Write, export, answer; print the tables."""
    arguments = _arguments()
    if arguments.child is not None:
        _child(arguments.child, arguments.workdir, arguments.method)
        return
    size = scaled(arguments.layers, arguments.vision_layers, arguments.scale)
    with contextlib.ExitStack() as stack:
        workdir = arguments.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not measure(workdir, size, arguments.method):
            sys.exit(1)


def scaled(layers: int, vision_layers: int, scale: int = 1) -> LlavaSize:
    """The shapes of LLaVA-1.5-7B with fewer layers, and widths and numbers of heads divided by ``scale``."""
    return replace(
        LLAVA_7B,
        num_layers=layers,
        vision_layers=vision_layers,
        hidden_size=LLAVA_7B.hidden_size // scale,
        intermediate_size=LLAVA_7B.intermediate_size // scale,
        num_heads=LLAVA_7B.num_heads // scale,
        vision_hidden_size=LLAVA_7B.vision_hidden_size // scale,
    )


def measure(workdir: Path, size: LlavaSize, method: str) -> bool:
    """Write what is missing, export, answer and print; says whether every target was met."""
    checkpoint = workdir / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").is_file():
        write_random_shards(checkpoint, size)
    files = weight_files(checkpoint)
    weights = sum(file.stat().st_size for file in files)
    exported, answered = (_run(child, workdir, method) for child in ("export", "answer"))
    print(describe_machine())
    print(describe_versions("torch", "onnxruntime", "onnx-ir"))
    print(
        f"LLaVA-1.5-7B's shapes, {size.num_layers} decoder layers of width {size.hidden_size}, {size.vision_layers} "
        f"vision layers of width {size.vision_hidden_size}, pruning: {method}; "
        f"{weights / GB:.2f} GB of float16 weights in {len(files)} shards\n"
    )
    print("| graph | trace s | write s | check s | compare s | of its own GB |")
    print("|---|---|---|---|---|---|")
    for name, graph in exported["graphs"].items():
        seconds = " | ".join(f"{second:.1f}" for second in graph["seconds"])
        print(f"| {name} | {seconds} | {graph['own_bytes'] / GB:.2f} |")
    traced = sum(sum(graph["seconds"]) for graph in exported["graphs"].values())
    print(
        f"\nreading the checkpoint and running the reference: {exported['reference'] / 60:.2f} min; graphs: "
        f"{traced / 60:.2f} min; together {exported['total'] / 60:.2f} min, {exported['processor'] / 60:.2f} min of "
        "processor time"
    )
    print(
        f"the answer: opened in {answered['open']:.1f} s, {answered['prompt']} tokens of prompt and {NEW_TOKENS} "
        f"new ones in {answered['answer']:.1f} s ({answered['first']:.1f} s to the first, then "
        f"{answered['token']:.1f} s each), peak {answered['peak'] / GB:.2f} GB, of its own "
        f"{answered['own_bytes'] / GB:.2f} GB\n"
    )
    rows = [
        ("peak of the export", exported["peak"], 1.3 * weights + 2 * GB, "1.3 × weights + 2 GB"),
        ("size of the bundle", exported["bundle"], 1.02 * weights, "1.02 × weights"),
    ]
    print("| result | GB | of weights | target GB | verdict |")
    print("|---|---|---|---|---|")
    for name, value, target, formula in rows:
        verdict = "met" if value <= target else "missed"
        print(
            f"| {name} | {value / GB:.2f} | {value / weights:.3f} | {target / GB:.2f} = {formula} | {verdict} |"
        )
    return all(value <= target for _, value, target, _ in rows)


@dataclass
class StageTimes:
    """Hears an export: seconds of every step of a graph, and the memory of its own after it.

    Attributes:
        begun: When the first graph began.
        graphs: By graph: "seconds" of the four steps, "own_bytes", the most at the end of a step.
    """

    begun: float | None = None
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _last: float = 0.0

    def graph(self, name: str, step: str, done: int, steps: int) -> None:
        """A step is over."""
        del step, steps
        now = time.monotonic()
        self.begun = self.begun or now
        entry = self.graphs.setdefault(name, {"seconds": [], "own_bytes": 0})
        if done:
            entry["seconds"].append(now - self._last)
            entry["own_bytes"] = max(entry["own_bytes"], own_memory("RssAnon"))
        self._last = now


def _run(child: str, workdir: Path, method: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", child, "--workdir", str(workdir), "--method", method]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _child(what: str, workdir: Path, method: str) -> None:
    """In a process of its own, whose peak is its own."""
    result = _export_here(workdir, method) if what == "export" else _answer_here(workdir / method)
    print(json.dumps({**result, "peak": own_memory("VmHWM"), "processor": time.process_time()}))


def _export_here(workdir: Path, method: str) -> dict[str, Any]:
    times, start = StageTimes(), time.monotonic()
    bundle = export(
        workdir / "checkpoint", workdir / method, methods=METHODS[method], dtype="float16", progress=times
    )
    assert times.begun is not None
    return {
        "graphs": times.graphs,
        "reference": times.begun - start,
        "total": time.monotonic() - start,
        "bundle": _size(bundle),
    }


def _answer_here(bundle: Path) -> dict[str, Any]:
    start = time.monotonic()
    with edgeprune.open_session(bundle) as session:
        opened = time.monotonic()
        options = edgeprune.SamplingOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        answer = session.answer([Image.new("RGB", (336, 336), "teal")], "What is this?", options)
        end = time.monotonic()
        own = own_memory("RssAnon")
    assert len(answer.token_ids) == NEW_TOKENS
    return {
        "open": opened - start,
        "answer": end - opened,
        "first": answer.timings_ms["time_to_first_token"] / 1e3,
        "token": answer.timings_ms["decode"] / answer.decode_steps / 1e3,
        "prompt": answer.prompt_tokens,
        "own_bytes": own,
    }


def _size(bundle: Bundle) -> int:
    return sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LLAVA_7B.num_layers, help="decoder layers")
    parser.add_argument("--vision-layers", type=int, default=LLAVA_7B.vision_layers, help="vision layers")
    parser.add_argument(
        "--scale", type=int, choices=(1, 2, 4, 8), default=1, help="what widths are divided by"
    )
    parser.add_argument("--method", choices=METHODS, default="fastv", help="pruning of the bundle")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoint and the bundle here")
    parser.add_argument("--child", choices=("export", "answer"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
