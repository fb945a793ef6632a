"""LLaVA-1.5-7B's shapes on an NVIDIA GPU: transformers, the unpruned bundle and pruned ones, prefill and decode.

    python benchmarks/gpu.py [--rounds 7] [--methods atp,fastv,adaptprune] [--providers cuda,tensorrt] [--workdir DIR]

Random weights in float16, made on the GPU; 576 visual + 64 text tokens; the decoder only, from hidden states to the
logits of the last row on the host. ATP's thresholds are set for [126, 88, 20] (the table says what was kept), FastV
keeps 50 %, AdaptPrune 10 %. Bundles run with ONNX Runtime's CUDA provider, and with its TensorRT provider where that is
installed; a provider that is not says so. The unpruned bundle and transformers are measured beside every method, in
turns, so that no more than two bundles are open and on disk at a time: 45 GB of memory on the GPU, 45 GB of disk. Fewer
--layers make both smaller. Exporting runs on the CPU. Without a GPU it says so and does nothing.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from decoders import BundleDecoder, RandomPrompt, TransformersDecoder, open_chain
from machine import describe_machine, describe_versions
from pruned_bundles import PRUNING_FILE, write_pruning
from random_llava import LLAVA_7B, LlavaSize, write_random_shards
from transformers import LlavaForConditionalGeneration
from turns import ratio, spread, take_turns

from edgeprune.errors import BackendError, MissingExtraError
from edgeprune.export.exporter import export
from edgeprune.export.progress import ProgressBars
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.fastv import FastV
from edgeprune.prune.method import PruningMethod
from edgeprune.runtimes.graph_chain import GraphChain

# None is the checkpoint's own, ATP.
METHODS: dict[str, list[PruningMethod] | None] = {
    "atp": None,
    "fastv": [FastV(keep_ratio=0.5)],
    "adaptprune": [AdaptPrune(keep_ratio=0.1)],
}
TRANSFORMERS, UNPRUNED = "transformers SDPA", "unpruned"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        size: Of the model.
        keep: Visual tokens behind ATP's sites.
        methods: Of ``METHODS``.
        providers: Of ONNX Runtime.
        rounds: Of every table.
        device: Of torch.
    """

    size: LlavaSize
    keep: tuple[int, ...]
    methods: tuple[str, ...]
    providers: tuple[str, ...]
    rounds: int
    device: str = "cuda"


def main() -> None:
    """Run the benchmark and print its table."""
    arguments = _arguments()
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here (or a torch built for the CPU): nothing was measured")
        return
    plan = Plan(
        replace(LLAVA_7B, num_layers=arguments.layers),
        tuple(int(count) for count in arguments.keep.split(",")),
        tuple(arguments.methods.split(",")),
        tuple(arguments.providers.split(",")),
        arguments.rounds,
    )
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    with contextlib.ExitStack() as stack:
        workdir = arguments.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        measure(workdir, plan)


def measure(workdir: Path, plan: Plan) -> None:
    """Write the checkpoint, export, measure and print; bundles of methods are removed when they were measured."""
    checkpoint = workdir / "checkpoint"
    if not (checkpoint / "model.safetensors.index.json").is_file():
        write_random_shards(checkpoint, plan.size, device=plan.device)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float16, attn_implementation="sdpa"
    )
    prompt = RandomPrompt(plan.size, model.config.image_token_index)
    if not (checkpoint / PRUNING_FILE).is_file():
        write_pruning(checkpoint, plan.keep, prompt)
    print(describe_machine())
    print(describe_versions("torch", "transformers"))
    print(
        f"{plan.size.num_layers} layers of width {plan.size.hidden_size}, float16; {plan.size.visual_tokens} visual + "
        f"{prompt.text_tokens} text tokens, one sequence; medians of {plan.rounds} interleaved rounds\n"
    )
    reference = TransformersDecoder(model.to(plan.device).eval(), prompt)
    lines = ["| provider | decoder | prefill ms | min … max | of unpruned | of transformers "]
    lines[0] += "| decode ms/token | min … max | of unpruned | of transformers | kept |"
    lines.append("|---" * 11 + "|")
    _export(workdir, UNPRUNED, [])
    for method in plan.methods:
        _export(workdir, method, METHODS[method])
        for provider in plan.providers:
            try:
                chains = {name: open_chain(workdir / name, provider) for name in (UNPRUNED, method)}
            except (BackendError, MissingExtraError) as error:
                print(f"{method} with {provider} was not measured: {error}")
                continue
            lines += _rows(provider, reference, chains, prompt, plan.rounds)
        shutil.rmtree(workdir / method)
    print("\n" + "\n".join(lines))


def _export(workdir: Path, name: str, methods: Sequence[PruningMethod] | None) -> None:
    if not (workdir / name).is_dir():
        with ProgressBars() as progress:
            export(
                workdir / "checkpoint", workdir / name, methods=methods, dtype="float16", progress=progress
            )


def _rows(
    provider: str,
    reference: TransformersDecoder,
    chains: dict[str, GraphChain],
    prompt: RandomPrompt,
    rounds: int,
) -> list[str]:
    bundles = {name: BundleDecoder(chain, prompt) for name, chain in chains.items()}
    decoders = {TRANSFORMERS: reference, **bundles}
    times = take_turns(
        {
            (name, what): run
            for name, decoder in decoders.items()
            for what, run in (("prefill", decoder.prefill), ("decode", decoder.decode))
        },
        rounds,
    )
    rows = []
    for name in decoders:
        cells = [provider if name in bundles else "-", name]
        for what in ("prefill", "decode"):
            cells.append(spread(times[name, what], 2))
            cells += [
                f"{ratio(times[name, what], times[base, what]):.3f}" for base in (UNPRUNED, TRANSFORMERS)
            ]
        kept = bundles[name].kept() if name in bundles else []
        cells.append(", ".join(map(str, kept)) or "-")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods to prune by")
    parser.add_argument("--providers", default="cuda,tensorrt", help="of ONNX Runtime")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at ATP's three sites")
    parser.add_argument("--layers", type=int, default=LLAVA_7B.num_layers, help="decoder layers")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoint and the unpruned bundle here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
