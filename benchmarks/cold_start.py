"""From the start of a process to its first token, and what opening a bundle costs beyond what it reads.

    python benchmarks/cold_start.py [--rounds 5] [--layers 24] [--hidden 1024] [--workdir DIR]

Exports the random LLaVA of prefill.py (float32) unpruned and pruned by ATP. Every start is a process of its own, with
the files in the page cache ("warm") or written out of it beforehand ("cold"); the cases take turns. The memory that
opening adds tells whether weights stay in their files: mapped, they lie in RssFile as far as they were read; copied,
they lie in RssAnon. One case has ONNX Runtime open the same graphs without rearranging weights for its kernels
(session.disable_prepacking), one without optimizing either, so that the difference shows what opening spends on these.
Target: opening takes at most a second for a bundle of 1 GB beyond reading, which warm files do not need. Linux only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from process_memory import own_memory

if TYPE_CHECKING:
    from random_llava import LlavaSize

# ONNX Runtime's own session entries, besides those with which edgeprune opens graphs.
NO_PREPACKING = {"session.disable_prepacking": "1"}
BUNDLES = ("unpruned", "atp")
MIB = 2**20


def main() -> None:
    """Run the benchmark, or be one of its processes."""
    arguments = _arguments()
    if arguments.child is not None:
        kind, bundle, begun = arguments.child
        _child(kind, Path(bundle), float(begun))
        return
    from random_llava import LlavaSize

    size = LlavaSize(num_layers=arguments.layers, hidden_size=arguments.hidden)
    keep = tuple(int(count) for count in arguments.keep.split(","))
    with contextlib.ExitStack() as stack:
        workdir = arguments.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure(workdir, size, keep, arguments.rounds)


def measure(workdir: Path, size: "LlavaSize", keep: tuple[int, ...], rounds: int, warm_up: int = 1) -> None:
    """Export what is missing, start processes in turns and print."""
    # Not at the top: processes that are measured import neither torch nor transformers.
    from machine import describe_machine, describe_versions
    from pruned_bundles import prepare
    from turns import spread, take_turns

    prepare(workdir, size, keep, {"unpruned": [], "ATP": None})
    starts = {
        (name, state): partial(_start, "first token", workdir / name, state == "cold")
        for name in BUNDLES
        for state in ("warm", "cold")
    }
    opens = {
        (name, kind): partial(_start, kind, workdir / name, cold=False)
        for name in BUNDLES
        for kind in ("session", "no prepacking", "neither")
    }
    print(describe_machine())
    print(f"{describe_versions('onnxruntime')}; {rounds} processes of every case, in turns\n")
    for name in BUNDLES:
        print(f"bundle {name}: {_bytes(workdir / name) / 1e9:.2f} GB")
    times = take_turns(starts, rounds, warm_up)
    print("\n| bundle | files | first token s | min … max | imports s | opening s | answering s |")
    print("|---|---|---|---|---|---|---|")
    for (name, state), results in times.items():
        cells = [name, state, spread([result["total"] for result in results], 2)]
        parts = ("imports", "open", "answer")
        cells += [f"{statistics.median(result[part] for result in results):.2f}" for part in parts]
        print(f"| {' | '.join(cells)} |")
    opened = take_turns(opens, rounds, warm_up)
    print("\n| bundle | opened by | s | min … max | RssAnon + MiB | RssFile + MiB |")
    print("|---|---|---|---|---|---|")
    titles = {
        "session": "edgeprune",
        "no prepacking": "ONNX Runtime, no prepacking",
        "neither": "ONNX Runtime, no prepacking, no optimization",
    }
    for (name, kind), results in opened.items():
        cells = [name, titles[kind], spread([result["open"] for result in results], 2)]
        grown = ("anon", "file")
        cells += [f"{statistics.median(result[part] for result in results) / MIB:.0f}" for part in grown]
        print(f"| {' | '.join(cells)} |")


def _start(kind: str, bundle: Path, cold: bool) -> dict[str, float]:
    """One process. CLOCK_MONOTONIC is the same in all of them."""
    for path in bundle.iterdir():
        if cold:
            _evict(path)
        else:
            _read(path)
    command = [sys.executable, __file__, "--child", kind, str(bundle), repr(time.monotonic())]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return answer


def _child(kind: str, bundle: Path, begun: float) -> None:
    import numpy as np

    import edgeprune

    before = {field: own_memory(field) for field in ("RssAnon", "RssFile")}
    imported = time.monotonic()
    if kind in ("first token", "session"):
        session = edgeprune.open_session(bundle)
    else:
        # Bound, so that they are still open when the memory is read.
        graphs = _open_graphs(bundle, optimize=kind != "neither")  # noqa: F841
    opened = time.monotonic()
    result = {
        "imports": imported - begun,
        "open": opened - imported,
        "anon": own_memory("RssAnon") - before["RssAnon"],
        "file": own_memory("RssFile") - before["RssFile"],
    }
    if kind == "first token":
        options = edgeprune.SamplingOptions(max_new_tokens=1, ignore_eos=True)
        session.answer([np.full((64, 64, 3), 90, np.uint8)], "What is this?", options)
        result["answer"] = time.monotonic() - opened
        result["total"] = time.monotonic() - begun
    print(json.dumps(result))


def _open_graphs(bundle: Path, *, optimize: bool) -> list[object]:
    import onnxruntime

    sessions: list[object] = []
    for path in sorted(bundle.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for key, value in NO_PREPACKING.items():
            options.add_session_config_entry(key, value)
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    return sessions


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(16 * MIB):
            pass


def _evict(path: Path) -> None:
    """Write a file out and drop it from the page cache; a file of memory (tmpfs) stays where it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="processes of every case that count")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at ATP's three sites")
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoint and the bundles here (6 GB)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
