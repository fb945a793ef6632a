"""Prefill and decode: transformers, the unpruned bundle, and the bundle pruned by ATP to given counts, side by side.

    python benchmarks/prefill.py [--rounds 7] [--keep 126,88,20] [--workdir DIR]

Builds a random LLaVA of about 0.4 B parameters (576 visual + 64 text tokens, float32), exports it unpruned and pruned
at ATP's sites scaled to its depth, and measures the decoder only (hidden states in, logits of the last row out). The
thresholds are set so that exactly the asked counts survive. All candidates run in turn in every round, so that a
machine that slows down slows all of them; ratios are taken within a round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from machine import describe_machine, gemm_rate
from random_llava import LlavaSize, write_random_llava
from safetensors.torch import save_file
from transformers import DynamicCache, LlavaForConditionalGeneration

from edgeprune import tensor_names as names
from edgeprune.bundle import Bundle
from edgeprune.checkpoint import load_checkpoint
from edgeprune.cost import DecoderShape, decoder_prefill_flops, layer_rows
from edgeprune.export.exporter import export
from edgeprune.export.progress import ProgressBars
from edgeprune.models.llama import Cut
from edgeprune.prune.atp import Atp, AtpSelector
from edgeprune.pruned_model import PrunedModel
from edgeprune.pruning_plan import PruningPlan
from edgeprune.runtimes.graph_chain import GraphChain, Stopwatch, TowerOutput
from edgeprune.runtimes.onnxruntime_backend import OnnxRuntimeBackend
from edgeprune.runtimes.pictures import PreparedPictures

TEXT_TOKENS = 64
PREFIX_TOKENS = 6
DECODE_STEPS = 8
PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = _arguments()
    keep = tuple(int(count) for count in arguments.keep.split(","))
    size = LlavaSize(num_layers=arguments.layers, hidden_size=arguments.hidden)
    if arguments.workdir is not None:
        measure(arguments.workdir, size, keep, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as workdir:
        measure(Path(workdir), size, keep, arguments.rounds)


def measure(workdir: Path, size: LlavaSize, keep: tuple[int, ...], rounds: int) -> None:
    """Build, export and measure; what is in ``workdir`` already is used again."""
    layers = tuple(max(1, round(layer * size.num_layers / PAPER_DEPTH)) for layer in PAPER_LAYERS)
    _prepare(workdir, size, layers, keep)
    print(describe_machine())
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        workdir / "checkpoint", attn_implementation="sdpa"
    ).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"random LLaVA, {parameters / 1e9:.2f} B parameters, float32; {size.visual_tokens} visual + {TEXT_TOKENS} text "
        f"tokens; ATP before layers {list(layers)} keeps {list(keep)}; medians of {rounds} interleaved rounds\n"
    )
    token_ids, pixels = _inputs(size, model.config.image_token_index)
    text_only = np.where(token_ids == model.config.image_token_index, 9, token_ids)
    reference = _TransformersDecoder(model, token_ids, pixels)
    unpruned, pruned = _open(Bundle.open(workdir / "unpruned")), _open(Bundle.open(workdir / "pruned"))
    prefills: dict[str, Callable[[], dict[str, float]]] = {
        "transformers SDPA": reference.prefill,
        "unpruned bundle": lambda: _prefill(unpruned, token_ids, pixels),
        "pruned bundle": lambda: _prefill(pruned, token_ids, pixels),
        "text only, one graph": lambda: _prefill(unpruned, text_only, None),
        "text only, chain": lambda: _prefill(pruned, text_only, None),
    }
    decodes: dict[str, Callable[[], float]] = {
        "transformers SDPA": reference.decode,
        "unpruned bundle": lambda: _decode(unpruned, token_ids, pixels),
        "pruned bundle": lambda: _decode(pruned, token_ids, pixels),
    }
    prefill_ms: dict[str, list[dict[str, float]]] = {name: [] for name in prefills}
    decode_ms: dict[str, list[float]] = {name: [] for name in decodes}
    for round_index in range(rounds + 1):
        for name, run in prefills.items():
            timings = run()
            if round_index:  # the first round warms up
                prefill_ms[name].append(timings)
        for name, step in decodes.items():
            milliseconds = step()
            if round_index:
                decode_ms[name].append(milliseconds)
    _report(pruned, size, layers, keep, prefill_ms, decode_ms)
    peak = gemm_rate(size.visual_tokens + TEXT_TOKENS, size.hidden_size, size.intermediate_size)
    flops = _prefill_flops(pruned, size, (), ())
    least = 1000 * flops / peak
    print(
        f"\nfloat32 matrix products on this machine: {peak / 1e9:.0f} GFLOP/s, at which the unpruned prefill "
        f"({flops / 1e9:.0f} GFLOP) takes {least:.0f} ms"
    )
    for name in ("transformers SDPA", "unpruned bundle"):
        share = least / statistics.median(sum(timings.values()) for timings in prefill_ms[name])
        print(f"{name}: {share:.0%} of that rate")


def _prepare(workdir: Path, size: LlavaSize, layers: tuple[int, ...], keep: tuple[int, ...]) -> None:
    """Write the checkpoint and its two bundles where they are missing."""
    checkpoint = workdir / "checkpoint"
    if not (checkpoint / "pruning.json").is_file():
        model = write_random_llava(checkpoint, size)
        token_ids, pixels = _inputs(size, model.config.image_token_index)
        del model
        _write_thresholds(checkpoint, layers, keep, token_ids, pixels)
    for name, methods in (("unpruned", ()), ("pruned", None)):
        if not (workdir / name).is_dir():
            export(checkpoint, workdir / name, methods=methods, progress=ProgressBars())


class _TransformersDecoder:
    """transformers' own decoder on the same hidden states."""

    def __init__(
        self, model: LlavaForConditionalGeneration, token_ids: np.ndarray, pixels: np.ndarray
    ) -> None:
        self.model = model
        with torch.no_grad():
            ids = torch.from_numpy(token_ids)[None]
            embeds = model.get_input_embeddings()(ids)
            features = model.get_image_features(pixel_values=torch.from_numpy(pixels))
            features = getattr(features, "pooler_output", features)
            visual = (
                torch.cat(list(features))
                if not isinstance(features, torch.Tensor)
                else features.flatten(0, 1)
            )
            embeds[ids == model.config.image_token_index] = visual
        self.embeds = embeds
        self.cache = DynamicCache()

    @torch.no_grad()
    def prefill(self) -> dict[str, float]:
        """Milliseconds from hidden states to the logits of the last row."""
        start = time.perf_counter()
        self.cache = DynamicCache()
        hidden = self.model.model.language_model(
            inputs_embeds=self.embeds, past_key_values=self.cache, use_cache=True
        )
        self.model.lm_head(hidden.last_hidden_state[:, -1])
        return {"prefill": 1000 * (time.perf_counter() - start)}

    @torch.no_grad()
    def decode(self) -> float:
        """Median milliseconds of a decode step after a prefill."""
        steps = []
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            hidden = self.model.model.language_model(
                input_ids=torch.tensor([[9]]), past_key_values=self.cache, use_cache=True
            )
            self.model.lm_head(hidden.last_hidden_state[:, -1])
            steps.append(1000 * (time.perf_counter() - start))
        return statistics.median(steps)


def _pictures(pixels: np.ndarray) -> PreparedPictures:
    """Random pixels as a picture of one tile."""
    size = LlavaSize()
    side = size.image_size // size.patch_size
    return PreparedPictures.of_whole_tiles(pixels, (side, side))


def _tower(chain: GraphChain, pixels: np.ndarray | None, watch: Stopwatch) -> TowerOutput | None:
    return None if pixels is None else chain.encode_pictures(_pictures(pixels), watch)


def _prefill(chain: GraphChain, token_ids: np.ndarray, pixels: np.ndarray | None) -> dict[str, float]:
    watch = Stopwatch()
    chain.prefill(token_ids, _tower(chain, pixels, watch), None, DECODE_STEPS, watch)
    return {
        name: ms
        for name, ms in watch.milliseconds.items()
        if name.startswith(("prefill", "select", "gather"))
    }


def _decode(chain: GraphChain, token_ids: np.ndarray, pixels: np.ndarray) -> float:
    watch = Stopwatch()
    _, sequence = chain.prefill(token_ids, _tower(chain, pixels, watch), None, DECODE_STEPS, watch)
    steps = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        chain.decode(9, sequence, watch)
        steps.append(1000 * (time.perf_counter() - start))
    return statistics.median(steps)


def _report(
    pruned: GraphChain,
    size: LlavaSize,
    layers: tuple[int, ...],
    keep: tuple[int, ...],
    prefill_ms: dict[str, list[dict[str, float]]],
    decode_ms: dict[str, list[float]],
) -> None:
    totals = {name: [sum(timings.values()) for timings in rows] for name, rows in prefill_ms.items()}
    base, ours, fewer = totals["transformers SDPA"], totals["unpruned bundle"], totals["pruned bundle"]
    print("| decoder | prefill ms | min … max | decode ms/token | min … max |")
    print("|---|---|---|---|---|")
    for name, values in totals.items():
        decode = decode_ms.get(name)
        row = f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} … {max(values):.1f} "
        row += (
            f"| {statistics.median(decode):.1f} | {min(decode):.1f} … {max(decode):.1f} |"
            if decode
            else "| | |"
        )
        print(row)
    flops_ratio = _flops_ratio(pruned, size, layers, keep)
    time_ratio = _ratio(fewer, ours)
    overhead = [
        sum(ms for name, ms in timings.items() if name.startswith(("select", "gather")))
        for timings in prefill_ms["pruned bundle"]
    ]
    rows = [
        ("unpruned bundle / transformers, prefill", _ratio(ours, base), "≤ 0.45"),
        (
            "unpruned bundle / transformers, decode",
            _ratio(decode_ms["unpruned bundle"], decode_ms["transformers SDPA"]),
            "≤ 0.45",
        ),
        ("pruned / unpruned, prefill time", time_ratio, f"≤ {1.05 * flops_ratio:.3f} (1.05 × FLOPs)"),
        ("pruned / unpruned, prefill FLOPs", flops_ratio, ""),
        ("saving efficiency of prefill", (1 - time_ratio) / (1 - flops_ratio), ""),
        (
            "pruned / unpruned, decode time",
            _ratio(decode_ms["pruned bundle"], decode_ms["unpruned bundle"]),
            "",
        ),
        (
            "chain / single graph, text only",
            _ratio(totals["text only, chain"], totals["text only, one graph"]),
            "≤ 1.01",
        ),
        ("score + select + gather / unpruned prefill", _ratio(overhead, ours), "≤ 0.005"),
        ("score + select + gather / pruned prefill", _ratio(overhead, fewer), "≤ 0.005"),
    ]
    print("\n| ratio | median | target |")
    print("|---|---|---|")
    for name, value, target in rows:
        print(f"| {name} | {value:.4f} | {target} |")
    stages = {
        name: statistics.median(t[name] for t in prefill_ms["pruned bundle"])
        for name in prefill_ms["pruned bundle"][0]
    }
    print("\npruned bundle by stage, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in stages.items()))


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _flops_ratio(
    pruned: GraphChain, size: LlavaSize, layers: tuple[int, ...], keep: tuple[int, ...]
) -> float:
    return _prefill_flops(pruned, size, layers, keep) / _prefill_flops(pruned, size, (), ())


def _prefill_flops(chain: GraphChain, size: LlavaSize, layers: tuple[int, ...], keep: tuple[int, ...]) -> int:
    shape = DecoderShape.from_geometry(chain.manifest.geometry)
    cuts = [Cut(layer) for layer in layers]
    return decoder_prefill_flops(
        shape, layer_rows(cuts, size.num_layers, size.visual_tokens, keep, TEXT_TOKENS)
    )


def _inputs(size: LlavaSize, image_token: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.integers(10, 250, TEXT_TOKENS)
    visual = np.full(size.visual_tokens, image_token)
    token_ids = np.concatenate([text[:PREFIX_TOKENS], visual, text[PREFIX_TOKENS:]]).astype(np.int64)
    return token_ids, rng.standard_normal((1, 3, size.image_size, size.image_size)).astype(np.float32)


def _write_thresholds(
    checkpoint: Path,
    layers: tuple[int, ...],
    keep: tuple[int, ...],
    token_ids: np.ndarray,
    pixels: np.ndarray,
) -> None:
    """Heads with zero weights whose biases put θ_r between the k-th and the next score of this input."""
    method = Atp(layers=layers, hidden_width=8, self_norm="minmax", cross_norm="minmax")
    source = load_checkpoint(checkpoint, methods=())
    plan = PruningPlan((method,), source.model.config.geometry)
    weights = {name: torch.zeros(shape) for name, shape in plan.weight_shapes().items()}
    for site, count in enumerate(keep):
        weights[f"atp.site{site}.head_s.bias"].fill_(20.0)  # θ_s = 1: no token is kept for its place
        # Sites behind this one keep everything or nothing; only this site's scores are read.
        model = PrunedModel(source.model, plan, weights)
        scores = _scores(model, site, token_ids, pixels)
        ordered = scores.sort(descending=True).values
        theta = float((ordered[count - 1] + ordered[count]) / 2)
        weights[f"atp.site{site}.head_r.bias"].fill_(
            float(torch.logit(torch.tensor(theta, dtype=torch.float64)))
        )
    save_file(weights, checkpoint / "pruning.safetensors")
    methods = [{"method": method.name, "parameters": method.parameters()}]
    (checkpoint / "pruning.json").write_text(json.dumps({"methods": methods}))


def _scores(model: PrunedModel, site: int, token_ids: np.ndarray, pixels: np.ndarray) -> torch.Tensor:
    """S_red of the visual tokens that reach a site."""
    prefill = model.prefill(token_ids, _pictures(pixels), record=True)
    inputs = next(inputs for stage, inputs, _ in prefill.record if stage.name == f"site{site}")
    selector = model.selects[site].selector
    assert isinstance(selector, AtpSelector)
    slots = inputs[names.VISUAL_SLOTS]
    layer = selector.layer - 1
    scores = selector.scores(
        inputs[names.query(layer)],
        inputs[names.present_key(layer)],
        slots,
        inputs[names.TEXT_ROWS],
        inputs[names.GRID_IDS],
        inputs[names.VISUAL_PLACES],
    )
    return scores.redundant_score[slots >= 0]


def _open(bundle: Bundle) -> GraphChain:
    backend = OnnxRuntimeBackend("cpu")
    graphs = {name: backend.load(bundle, name) for name in bundle.manifest.graphs}
    return GraphChain(bundle.manifest, backend, graphs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--keep", default="126,88,20", help="visual tokens kept at the three sites")
    parser.add_argument("--layers", type=int, default=24, help="decoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the decoder")
    parser.add_argument(
        "--workdir", type=Path, help="keep the checkpoint and the bundles here (6 GB) and reuse them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
