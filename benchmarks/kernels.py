"""The kernels on an NVIDIA GPU: microseconds, GB/s or TFLOP/s, and the share of what the GPU can do.

    python benchmarks/kernels.py [--rounds 7]

Limits are measured in the same run, not read from a data sheet: a copy of 1 GiB for bytes, a product of 8192×8192
float16 matrices for multiply-adds. A time is that of one call in a CUDA graph of many (so the cost of launching from
Python does not count), the median of interleaved rounds. Every result is compared with torch's before it is timed.
Inputs below 64 MiB stay in the GPU's cache from call to call, as they do behind the layer that wrote them; their GB/s
may exceed those of memory. Without a GPU it says so and does nothing.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgeprune.operators.attention_score import attention_score
from edgeprune.operators.token_select import select_by_soft_nms, select_by_threshold, select_top_k
from edgeprune.plugins.build import build
from edgeprune.plugins.kernel_library import KernelLibrary

CALLS = 20  # in one CUDA graph


@dataclass
class Candidate:
    """One line of the table.

    Attributes:
        name: What is measured.
        run: The call.
        moved: Bytes that it must read and write at least.
        flops: Floating-point operations that it does.
        target_us: Microseconds that it may take on an H200.
        target_share: Share of the copy rate that it must reach.
    """

    name: str
    run: Callable[[], object]
    moved: float = 0
    flops: float = 0
    target_us: float | None = None
    target_share: float | None = None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each candidate")
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here (or a torch built for the CPU): nothing was measured")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    major, minor = torch.cuda.get_device_capability()
    output = Path(__file__).parents[1] / "out" / "plugins-gpu"
    kernels = KernelLibrary(build(output, architectures=(10 * major + minor,)).kernels, "cuda")

    copied, copy_target = (torch.empty(2**29, dtype=torch.int16, device="cuda") for _ in range(2))
    left, right = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    limits = [
        Candidate("copy of 1 GiB", lambda: copy_target.copy_(copied), moved=2 * copied.nbytes),
        Candidate("product of 8192² float16", lambda: left @ right, flops=2 * 8192**3),
    ]
    candidates = [*gathers(kernels), *selections(kernels), *scores(kernels)]
    times = measure([*limits, *candidates], rounds)
    bytes_limit = limits[0].moved / times[limits[0].name]
    flops_limit = limits[1].flops / times[limits[1].name]

    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, medians of {rounds} rounds\n")
    print("| | µs | GB/s | of copy | TFLOP/s | of product | target on an H200 |")
    print("|---|---|---|---|---|---|---|")
    missed = []
    for one in [*limits, *candidates]:
        seconds = times[one.name]
        rate, flops = one.moved / seconds, one.flops / seconds
        cells = [one.name, f"{seconds * 1e6:.1f}"]
        cells += [f"{rate / 1e9:.0f}", f"{rate / bytes_limit:.0%}"] if one.moved else ["", ""]
        cells += [f"{flops / 1e12:.1f}", f"{flops / flops_limit:.0%}"] if one.flops else ["", ""]
        cells.append(_target(one))
        print(f"| {' | '.join(cells)} |")
        too_slow = one.target_us is not None and seconds * 1e6 > one.target_us
        if too_slow or (one.target_share is not None and rate < one.target_share * bytes_limit):
            missed.append(one.name)
    if "H200" in name and missed:
        sys.exit(f"Missed: {', '.join(missed)}")


def _target(one: Candidate) -> str:
    if one.target_us is not None:
        return f"≤ {one.target_us:g} µs"
    return f"≥ {one.target_share:.0%} of copy" if one.target_share is not None else ""


def measure(candidates: list[Candidate], rounds: int) -> dict[str, float]:
    """Seconds per call; all candidates take turns in every round."""
    graphs = {}
    for candidate in candidates:
        candidate.run()  # what is done once, such as asking for shared memory
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                candidate.run()
        graphs[candidate.name] = graph
        graph.replay()
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / CALLS)
    return {name: statistics.median(measured) for name, measured in times.items()}


def gathers(kernels: KernelLibrary) -> list[Candidate]:
    """What a site gathers, a batch large enough to show the bandwidth, and a cache."""
    found = []
    for name, S, K, target in (
        ("gather 128 of 640 rows, 4096 wide, with positions", 640, 128, None),
        ("gather 32768 of 65536 rows, 4096 wide, with positions", 65536, 32768, 0.8),
    ):
        keep = torch.randperm(S, device="cuda")[:K].sort().values
        hidden = torch.randn(1, S, 4096, device="cuda", dtype=torch.float16)
        positions = torch.arange(S, device="cuda").view(1, S)
        gathered = kernels.token_gather(keep, [hidden, positions], [1, 1])
        _require(torch.equal(gathered[0], hidden.index_select(1, keep)), name)
        moved = 2 * K * (4096 * 2 + 8) + 8 * K
        run = _gather_call(kernels, keep, [hidden, positions])
        found.append(Candidate(name, run, moved=moved, target_share=target))
    cache = torch.randn(2, 1, 32, 4096, 128, device="cuda", dtype=torch.float16)
    keep = torch.randperm(4096, device="cuda")[:2048].sort().values
    name = "compact a layer's cache from 4096 to 2048 rows, 32 heads of 128"
    kept, _ = kernels.compact_cache(cache[0], cache[1], keep, cached_rows=4096, capacity=2048)
    _require(torch.equal(kept, cache[0].index_select(2, keep)), name)
    moved = 2 * 2 * kept.nbytes + 8 * 2048

    # Through the gather with one block per head: compact_cache() would also clear its outputs.
    def compact() -> object:
        return kernels.token_gather(keep, [cache[0], cache[1]], [2, 2])

    return [*found, Candidate(name, compact, moved=moved)]


def _gather_call(kernels: KernelLibrary, keep: Tensor, tensors: list[Tensor]) -> Callable[[], object]:
    return lambda: kernels.token_gather(keep, tensors, [1] * len(tensors))


def selections(kernels: KernelLibrary) -> list[Candidate]:
    """Top-k and threshold of 640, 4,096 and 16,384 scores, and AdaptPrune's choice."""
    found = []
    for S in (640, 4096, 16384):
        target = 15 if S == 4096 else None
        scores = torch.rand(1, S, device="cuda").pow(8)  # as uneven as attention
        droppable = torch.ones(1, S, dtype=torch.bool, device="cuda")
        num_keep = torch.tensor([S // 8], device="cuda")
        order, count = kernels.select_top_k(scores, num_keep, droppable)
        expected = select_top_k(scores, num_keep[0], droppable[0])
        _require(torch.equal(order[0], expected[0]) and count[0] == expected[1], f"top-k of {S}")
        run = _bound(kernels.select_top_k, scores, num_keep, droppable)
        found.append(Candidate(f"top-k of {S}", run, target_us=target))
        pairs, thresholds = torch.rand(1, 2, S, device="cuda"), torch.full((1, 2, S), 0.9, device="cuda")
        order, count = kernels.select_by_threshold(pairs, thresholds, droppable)
        expected = select_by_threshold(pairs[0], thresholds[0], droppable[0])
        _require(torch.equal(order[0], expected[0]) and count[0] == expected[1], f"threshold of {S}")
        run = _bound(kernels.select_by_threshold, pairs, thresholds, droppable)
        found.append(Candidate(f"two thresholds of {S}", run, target_us=target))
    return [*found, soft_nms(kernels)]


def soft_nms(kernels: KernelLibrary) -> Candidate:
    """AdaptPrune at LLaVA-1.5-7B: 58 of 576 patches, keys of width 4096."""
    side, F, name = 24, 4096, "soft NMS, 58 of 576 patches, features 4096 wide"
    S = side * side
    squared = torch.arange(26, device="cuda")
    inputs = (
        torch.rand(1, S, device="cuda"),
        torch.tensor([58], device="cuda"),
        torch.ones(1, S, dtype=torch.bool, device="cuda"),
        torch.randn(1, S, F, device="cuda", dtype=torch.float16),
        torch.cartesian_prod(*(torch.arange(side, device="cuda"),) * 2).view(1, S, 2),
        torch.cat((torch.exp(-squared / 4.5), torch.zeros(1, device="cuda"))),
    )
    order, count = kernels.select_by_soft_nms(*inputs, similarity_sigma=0.05)
    scores, num_keep, droppable, features, places, nearness = inputs
    expected = select_by_soft_nms(
        scores, num_keep[0], droppable[0], features[0].float(), places[0], nearness, similarity_sigma=0.05
    )
    _require(torch.equal(order[0], expected[0]) and count[0] == expected[1], name)

    def run() -> object:
        return kernels.select_by_soft_nms(*inputs, similarity_sigma=0.05)

    return Candidate(name, run)


def scores(kernels: KernelLibrary) -> list[Candidate]:
    """LLaVA-1.5-7B's 640 rows in all their uses, a long sequence, and grouped heads."""
    sizes = [
        ("score of all 640 rows, 32 heads of 128", 32, 32, 640, 640, "probabilities", 60.0),
        ("score of 64 text rows of 640", 32, 32, 64, 640, "probabilities", None),
        ("score of the last row of 640", 32, 32, 1, 640, "probabilities", None),
        ("logits of all 640 rows", 32, 32, 640, 640, "logits", None),
        ("score of the last row of 16384, 28 heads on 4", 28, 4, 1, 16384, "probabilities", None),
        ("score of all 2048 rows, 28 heads on 4", 28, 4, 2048, 2048, "probabilities", None),
    ]
    found = []
    for name, H, Hkv, R, S, mode, target in sizes:
        D = 128
        query = torch.randn(1, H, R, D, device="cuda", dtype=torch.float16)
        key = torch.randn(1, Hkv, S, D, device="cuda", dtype=torch.float16)
        rows = torch.arange(S - R, S, device="cuda")
        weight = torch.full((1, R), 1 / R, device="cuda")
        run = _score_call(kernels, query, key, rows, weight, mode)
        ours = kernels.attention_score(query, key, rows, weight, scale=D**-0.5, mode=mode)
        theirs = attention_score(query, key, rows, weight, scale=D**-0.5, mode=mode)
        off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        _require(off < 1e-4, f"{name}: off by {off:.1e} of the largest score")
        # Operations that a mask leaves: a row sees half of the R last keys on average, and all before them. They are
        # counted once, though the tiles are computed twice: the second time is this kernel's own cost.
        seen = R * (S - R) + R * (R + 1) / 2
        flops = 2 * H * D * seen if mode == "probabilities" else 0
        few = mode == "logits" or R == 1
        moved = query.nbytes + key.nbytes if few else 0
        found.append(Candidate(name, run, moved=moved, flops=0 if few else flops, target_us=target))
    return found


def _score_call(
    kernels: KernelLibrary, query: Tensor, key: Tensor, rows: Tensor, weight: Tensor, mode: str
) -> Callable[[], object]:
    scale = query.shape[-1] ** -0.5
    return lambda: kernels.attention_score(query, key, rows, weight, scale=scale, mode=mode)


def _bound(function: Callable[..., object], *arguments: Tensor) -> Callable[[], object]:
    return lambda: function(*arguments)


def _require(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"Wrong result, nothing was measured: {what}. 'make test-gpu' shows where")


if __name__ == "__main__":
    main()
