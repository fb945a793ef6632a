"""Prefill and decode: transformers, the unpruned bundle, and bundles pruned by every kind of method, side by side.

    python benchmarks/prefill.py [--rounds 7] [--keep 126,88,20] [--lengths 256,640,…] [--batch 4] [--workdir DIR]

Builds a random LLaVA of about 0.4 B parameters (576 visual + 64 text tokens, float32), exports it unpruned and pruned,
and measures the decoder only (hidden states in, logits of the last row out). ATP's sites are scaled to the depth, and
its thresholds are set so that exactly the asked counts survive. A first table has one picture and what a bundle costs
over transformers; a second one several requests at once, which transformers takes as a batch and a bundle one after the
other, because its graphs take one sequence (docs/architecture.md); a third one every method at several lengths of the
prompt, which grow by whole pictures: 256 rows are text alone, 2944 hold five pictures. Longer ones (4096 hold seven)
take more than 24 GiB with all bundles, so name some with --bundles. IVTP is measured without its text tower; what it
saves in the vision tower is not in these tables. All candidates run in turn in every round; ratios are taken within a
round.

There is no bundle of another exporter: optimum-onnx 0.1.0 asks for transformers below 4.58, so it cannot be installed
beside 5.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from decoders import BundleBatch, BundleDecoder, RandomPrompt, TransformersDecoder, open_chain, prompt_of_rows
from machine import describe_machine, describe_versions, gemm_rate
from pruned_bundles import prepare
from random_llava import LlavaSize
from transformers import LlavaForConditionalGeneration
from turns import ratio, spread, take_turns

from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import PruningMethod
from edgeprune.runtimes.graph_chain import GraphChain

TRANSFORMERS, UNPRUNED, ATP = "transformers SDPA", "unpruned", "ATP"
BUNDLES = (UNPRUNED, ATP, "IVTP", "FastV", "AdaptPrune")
LENGTHS = "256,640,1216,2944"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        size: Of the model.
        keep: Visual tokens behind ATP's sites, of one picture.
        batch: Requests of the second table; below 2 there is none.
        lengths: Rows of the prompts of the third table.
        rounds: Of every table.
        bundles: Of ``BUNDLES``; the first two are among them.
    """

    size: LlavaSize
    keep: tuple[int, ...]
    batch: int
    lengths: tuple[int, ...]
    rounds: int
    bundles: tuple[str, ...] = BUNDLES


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = _arguments()
    plan = Plan(
        LlavaSize(num_layers=arguments.layers, hidden_size=arguments.hidden),
        tuple(int(count) for count in arguments.keep.split(",")),
        arguments.batch,
        tuple(int(rows) for rows in arguments.lengths.split(",") if rows),
        arguments.rounds,
        (UNPRUNED, ATP, *(name for name in BUNDLES[2:] if name in arguments.bundles.split(","))),
    )
    if arguments.workdir is not None:
        measure(arguments.workdir, plan)
        return
    with tempfile.TemporaryDirectory() as workdir:
        measure(Path(workdir), plan)


def measure(workdir: Path, plan: Plan) -> None:
    """Build, export and measure; what is in ``workdir`` already is used again."""
    methods = {name: chosen for name, chosen in pruning_methods(plan.size).items() if name in plan.bundles}
    prepare(workdir, plan.size, plan.keep, methods)
    print(describe_machine())
    print(f"{describe_versions('torch', 'transformers', 'onnxruntime')}, {torch.get_num_threads()} threads")
    model = LlavaForConditionalGeneration.from_pretrained(
        workdir / "checkpoint", attn_implementation="sdpa"
    ).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prompt = RandomPrompt(plan.size, model.config.image_token_index)
    print(
        f"random LLaVA, {parameters / 1e9:.2f} B parameters, float32; {plan.size.visual_tokens} visual + "
        f"{prompt.text_tokens} text tokens; medians of {plan.rounds} interleaved rounds\n"
    )
    chains = {name: open_chain(workdir / name.lower()) for name in methods}
    _one_picture(TransformersDecoder(model, prompt), chains, prompt, plan)
    if plan.batch > 1:
        _batch(TransformersDecoder(model, prompt, plan.batch), chains, prompt, plan)
    del model
    _lengths(chains, prompt.image_token, plan)


def pruning_methods(size: LlavaSize) -> dict[str, list[PruningMethod] | None]:
    """What is exported, by name; None is the checkpoint's own, ATP."""
    after_vision, after_decoder = (max(1, round(size.visual_tokens * tokens / 576)) for tokens in (120, 64))
    ivtp = Ivtp(
        tokens_after_vision=after_vision,
        tokens_after_decoder=after_decoder,
        decoder_layers=max(3, round(12 * size.num_layers / 32)),
        text_selection="all",
    )
    return {
        UNPRUNED: [],
        ATP: None,
        "IVTP": [ivtp],
        "FastV": [FastV(layer=2, keep_ratio=0.5)],
        "AdaptPrune": [AdaptPrune(layer=3, keep_ratio=0.1)],
    }


def _one_picture(
    reference: TransformersDecoder, chains: dict[str, GraphChain], prompt: RandomPrompt, plan: Plan
) -> None:
    text = RandomPrompt(plan.size, prompt.image_token, 0, prompt.rows)
    unpruned, pruned = BundleDecoder(chains[UNPRUNED], prompt), BundleDecoder(chains[ATP], prompt)
    bundles = {
        "unpruned bundle": unpruned,
        "bundle pruned by ATP": pruned,
        "text only, one graph": BundleDecoder(chains[UNPRUNED], text),
        "text only, chain": BundleDecoder(chains[ATP], text),
    }
    ours, fewer, one_graph, chain = bundles
    decoded = (TRANSFORMERS, ours, fewer)
    decoders = {TRANSFORMERS: reference, **bundles}
    stages: list[dict[str, float]] = []

    def prefill_by_stage() -> float:
        stages.append(pruned.stages())
        return sum(stages[-1].values())

    candidates = {("prefill", name): decoder.prefill for name, decoder in decoders.items()}
    candidates["prefill", fewer] = prefill_by_stage
    candidates |= {("decode", name): decoders[name].decode for name in decoded}
    times = take_turns(candidates, plan.rounds)
    measured_stages = stages[-plan.rounds :]
    print("| decoder | prefill ms | min … max | decode ms/token | min … max |")
    print("|---|---|---|---|---|")
    for name in decoders:
        decode = spread(times["decode", name]) if name in decoded else " | "
        print(f"| {name} | {spread(times['prefill', name])} | {decode} |")
    print(f"\nvisual tokens behind ATP's sites: {pruned.kept()}, asked for: {list(plan.keep)}")

    def of(what: str, numerator: str, denominator: str) -> float:
        return ratio(times[what, numerator], times[what, denominator])

    flops_ratio, time_ratio = pruned.flops() / unpruned.flops(), of("prefill", fewer, ours)
    overhead = [_selecting(stage) for stage in measured_stages]
    rows: list[tuple[str, float, str]] = [
        ("unpruned bundle / transformers, prefill", of("prefill", ours, TRANSFORMERS), "≤ 0.40"),
        ("unpruned bundle / transformers, decode", of("decode", ours, TRANSFORMERS), "≤ 0.40"),
        ("pruned / unpruned, prefill time", time_ratio, f"≤ {1.05 * flops_ratio:.3f} (1.05 × FLOPs)"),
        ("pruned / unpruned, prefill FLOPs", flops_ratio, ""),
        ("saving efficiency of prefill", (1 - time_ratio) / (1 - flops_ratio), "≥ 0.98"),
        ("pruned / unpruned, decode time", of("decode", fewer, ours), "≤ 1"),
        ("chain / single graph, text only", of("prefill", chain, one_graph), "≤ 1.01"),
        ("score + select + gather / unpruned prefill", ratio(overhead, times["prefill", ours]), "≤ 0.003"),
        ("score + select + gather / pruned prefill", ratio(overhead, times["prefill", fewer]), ""),
    ]
    print("\n| ratio | median | target |")
    print("|---|---|---|")
    for name, value, target in rows:
        print(f"| {name} | {value:.4f} | {target} |")
    medians = {
        name: statistics.median(stage[name] for stage in measured_stages) for name in measured_stages[0]
    }
    print("\npruned bundle by stage, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items()))
    _print_limit(unpruned, {name: times["prefill", name] for name in (TRANSFORMERS, ours)})


def _print_limit(unpruned: BundleDecoder, times: dict[str, Sequence[float]]) -> None:
    size = unpruned.prompt.size
    peak = gemm_rate(unpruned.prompt.rows, size.hidden_size, size.intermediate_size)
    flops = unpruned.flops()
    least = 1000 * flops / peak
    print(
        f"\nfloat32 matrix products on this machine: {peak / 1e9:.0f} GFLOP/s, at which the unpruned prefill "
        f"({flops / 1e9:.0f} GFLOP) takes {least:.0f} ms"
    )
    for name, values in times.items():
        print(f"{name}: {least / statistics.median(values):.0%} of that rate")


def _batch(
    reference: TransformersDecoder, chains: dict[str, GraphChain], prompt: RandomPrompt, plan: Plan
) -> None:
    decoders: dict[str, TransformersDecoder | BundleBatch] = {TRANSFORMERS: reference}
    for name in (UNPRUNED, ATP):
        requests = [BundleDecoder(chains[name], prompt) for _ in range(plan.batch)]
        decoders[name] = BundleBatch(requests)
    candidates = {("prefill", name): decoder.prefill for name, decoder in decoders.items()}
    candidates |= {("decode", name): decoder.decode for name, decoder in decoders.items()}
    times = take_turns(candidates, plan.rounds)
    heads = ["requests", "decoder", "prefill ms", "min … max", "of transformers"]
    heads += ["decode ms/step", "min … max", "of transformers"]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in decoders:
        cells = [str(plan.batch), name]
        for what in ("prefill", "decode"):
            measured = times[what, name]
            cells += [spread(measured), f"{ratio(measured, times[what, TRANSFORMERS]):.3f}"]
        print(f"| {' | '.join(cells)} |")


def _lengths(chains: dict[str, GraphChain], image_token: int, plan: Plan) -> None:
    if not plan.lengths:
        return
    heads = ["rows of the prompt", "pictures", "bundle", "prefill ms", "min … max", "of unpruned", "FLOPs"]
    heads += ["saving efficiency", "selecting, of unpruned", "kept"]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for rows in plan.lengths:
        prompt = prompt_of_rows(plan.size, image_token, rows)
        decoders = {name: BundleDecoder(chain, prompt) for name, chain in chains.items()}
        stages = take_turns({name: decoder.stages for name, decoder in decoders.items()}, plan.rounds)
        times = {name: [sum(stage.values()) for stage in rounds] for name, rounds in stages.items()}
        base = decoders[UNPRUNED].flops()
        for name, decoder in decoders.items():
            time_ratio, flops_ratio = ratio(times[name], times[UNPRUNED]), decoder.flops() / base
            efficiency = f"{(1 - time_ratio) / (1 - flops_ratio):.1%}" if flops_ratio < 1 else "-"
            selecting = ratio([_selecting(stage) for stage in stages[name]], times[UNPRUNED])
            cells = [str(rows), str(prompt.num_pictures), name, spread(times[name])]
            cells += [f"{time_ratio:.3f}", f"{flops_ratio:.3f}", efficiency, f"{selecting:.2%}"]
            cells.append(", ".join(map(str, decoder.kept())) or "-")
            print(f"| {' | '.join(cells)} |", flush=True)


def _selecting(stages: dict[str, float]) -> float:
    """Milliseconds of scoring, selecting and gathering."""
    return sum(ms for name, ms in stages.items() if not name.startswith("prefill"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at ATP's three sites")
    parser.add_argument("--batch", type=int, default=4, help="requests of the second table; 1 = no table")
    parser.add_argument("--lengths", default=LENGTHS, help="rows of the third table's prompts; '' = no table")
    parser.add_argument(
        "--bundles", default=",".join(BUNDLES[2:]), help=f"beside {UNPRUNED} and {ATP}; '' = none"
    )
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument(
        "--workdir", type=Path, help="keep the checkpoint and the bundles here (12 GB) and reuse them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
