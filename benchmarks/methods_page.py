"""Every method on the example, as exported bundles, at the same average numbers of visual tokens.

    python benchmarks/methods_page.py [--questions 600] [--write docs]

Scales each method to 50, 25 and 10 % of the visual tokens (averaged over the decoder's layers), exports it, asks all
bundles the same held-out questions (they take turns question by question), and prints accuracy, tokens, FLOPs and
time. ATP's heads are trained for each budget, once; the results are kept beside the bundles. With ``--write`` the
table and a plot go into that folder as results.md and results.png.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
from machine import describe_machine
from shapes_tally import EXAMPLE, Tally, ivtp_candidates, nearest_to, open_tally, ratio_to

from edgeprune.checkpoint import load_checkpoint
from edgeprune.errors import PruningError
from edgeprune.prune.adaptprune import AdaptPrune
from edgeprune.prune.cdpruner import CdPruner
from edgeprune.prune.dart import Dart
from edgeprune.prune.evit import Evit
from edgeprune.prune.fastv import FastV
from edgeprune.prune.ivtp_vision import IvtpVision
from edgeprune.prune.method import ModelGeometry, PruningMethod
from edgeprune.prune.prumerge import PruMerge
from edgeprune.prune.prumerge_plus import PruMergePlus
from edgeprune.prune.pyramiddrop import PyramidDrop
from edgeprune.prune.random_tokens import RandomTokens
from edgeprune.prune.sparsevlm import SparseVlm
from edgeprune.prune.spatial_pooling import SpatialPooling
from edgeprune.prune.tome import Tome
from edgeprune.prune.topk import TopK
from edgeprune.prune.visionzip import VisionZip
from edgeprune.prune.vtw import Vtw

SHARES = (0.5, 0.25, 0.1)
LAYERS = (1, 4, 8)
# CLIP's layers after whose attention EViT drops tokens, 3, 6 and 9 of 12, scaled to the example's tower.
EVIT_LAYERS = (1, 2, 3)


def fastv(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """Before layer 1, at every number."""
    yield from (FastV(layer=1, keep=keep) for keep in range(1, geometry.num_patches))


def adaptprune(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """Before layer 1, at every number."""
    yield from (AdaptPrune(layer=1, keep=keep) for keep in range(1, geometry.num_patches))


def pyramiddrop(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """Halved at every site."""
    for last in range(1, geometry.num_patches // 4):
        ratios = tuple(min(1.0, factor * last / geometry.num_patches) for factor in (4, 2, 1))
        yield PyramidDrop(layers=LAYERS, keep_ratios=ratios)


def sparsevlm(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """Halved at every site, without the counts that do not fit."""
    for last in range(1, geometry.num_patches // 4):
        method = SparseVlm(layers=tuple(layer - 1 for layer in LAYERS), keep=(4 * last, 2 * last, last))
        try:
            method.check(geometry)
        except PruningError:
            continue
        yield method


def vtw(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """At every layer."""
    yield from (Vtw(layer=layer) for layer in range(1, geometry.num_layers))


def evit(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """At every share that leaves another number."""
    del geometry
    yield from (Evit(layers=EVIT_LAYERS, keep_ratio=percent / 100) for percent in range(1, 100))


def prumerge(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """With a fixed share."""
    patches = geometry.num_patches
    yield from (PruMerge(keep_ratio=keep / patches) for keep in range(1, patches))


def prumerge_plus(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """With a fixed share of patches that stand out."""
    patches = geometry.num_patches
    yield from (PruMergePlus(keep_ratio=keep / patches) for keep in range(1, patches))


def visionzip(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """In upstream's proportions, 54 dominant to 10 contextual tokens."""
    for total in range(2, geometry.num_patches):
        contextual = max(1, round(total * 10 / 64))
        yield VisionZip(dominant=total - contextual, contextual=contextual)


def spatial_pooling(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """To squares."""
    yield from (SpatialPooling(rows=side, columns=side) for side in range(1, geometry.grid[0] + 1))


def by_number(method: type[PruningMethod]) -> Callable[[ModelGeometry], Iterator[PruningMethod]]:
    """A method whose parameter ``keep`` is all that matters."""

    def every(geometry: ModelGeometry) -> Iterator[PruningMethod]:
        yield from (method(keep=keep) for keep in range(1, geometry.num_patches + 1))

    return every


def tome(geometry: ModelGeometry) -> Iterator[PruningMethod]:
    """At every r."""
    yield from (Tome(r=r) for r in range(1, geometry.num_patches // 2))


# Every method at many budgets, with the paper's layers scaled to the example's twelve.
CANDIDATES: dict[str, Callable[[ModelGeometry], Iterable[PruningMethod]]] = {
    "AdaptPrune": adaptprune,
    "FastV": fastv,
    "IVTP": ivtp_candidates,
    "PyramidDrop": pyramiddrop,
    "SparseVLM": sparsevlm,
    "VTW": vtw,
    "EViT": evit,
    "ToMe": tome,
    "IVTP-V": by_number(IvtpVision),
    "PruMerge": prumerge,
    "PruMerge+": prumerge_plus,
    "VisionZip": visionzip,
    "TopK": by_number(TopK),
    "pooling": spatial_pooling,
    "random": by_number(RandomTokens),
    "CDPruner": by_number(CdPruner),
    "DART": by_number(Dart),
}
METHODS = ("ATP", *CANDIDATES)


def atp_checkpoint(share: float, output: Path) -> Path:
    """The example with ATP's heads fitted to a budget."""
    folder = output / f"checkpoint-atp-{100 * share:.0f}"
    if share == 0.25:
        return EXAMPLE / "checkpoint"
    if not (folder / "pruning.safetensors").is_file():
        command = [sys.executable, str(EXAMPLE / "train_atp.py"), "--output", str(folder)]
        command += ["--target-tokens", f"{100 * share:g}%", "--questions", "0"]
        subprocess.run(command, check=True, cwd=EXAMPLE)
    return folder


def main() -> None:
    """Export, ask, print."""
    arguments = _arguments()
    sys.path.insert(0, str(EXAMPLE))
    from heldout import held_out_questions

    output = arguments.output.resolve()
    checkpoint = EXAMPLE / "checkpoint"
    geometry = load_checkpoint(checkpoint, methods=()).model.config.geometry
    unpruned = open_tally("unpruned", checkpoint, output / "page-unpruned", ())
    tallies: dict[tuple[str, float], Tally] = {}
    for share in SHARES:
        for name in METHODS:
            bundle = output / f"page-{name.lower()}-{100 * share:.0f}"
            if name == "ATP":
                tallies[name, share] = open_tally(name, atp_checkpoint(share, output), bundle, None)
                continue
            method = nearest_to(share * geometry.num_patches, CANDIDATES[name](geometry), geometry)
            clip = EXAMPLE / "clip" if name == "IVTP" else None
            tallies[name, share] = open_tally(name, checkpoint, bundle, (method,), clip)
    for image, question, scene in held_out_questions(arguments.questions, seed=arguments.seed):
        for tally in (unpruned, *tallies.values()):
            tally.ask(image, question.text, question.answer, len(scene.things))
    text = _table(unpruned, tallies, arguments.questions)
    print(text)
    if arguments.write:
        (arguments.write / "results.md").write_text(_page(text), encoding="utf-8")
        _plot(unpruned, tallies, arguments.write / "results.png")


def _table(unpruned: Tally, tallies: dict[tuple[str, float], Tally], questions: int) -> str:
    full, flops = statistics.mean(unpruned.right), statistics.mean(unpruned.flops)
    what = (
        f"{questions} held-out questions, greedy answers of the exported bundles, unpruned {100 * full:.1f} %"
    )
    lines = [f"{what}; {describe_machine()}."]
    for share in SHARES:
        lines += [
            "",
            f"**{100 * share:.0f} % of the visual tokens**",
            "",
            "| method | accuracy | of unpruned | visual tokens per layer | FLOPs | time |",
            "|---|---|---|---|---|---|",
        ]
        ranked = sorted(
            (tally for (_, at), tally in tallies.items() if at == share),
            key=lambda tally: -statistics.mean(tally.right),
        )
        lines += [
            f"| {tally.name} | {100 * statistics.mean(tally.right):.1f} % "
            f"| {100 * statistics.mean(tally.right) / full:.1f} % | {statistics.mean(tally.tokens):.1f} "
            f"| {100 * statistics.mean(tally.flops) / flops:.0f} % | {100 * ratio_to(tally, unpruned):.0f} % |"
            for tally in ranked
        ]
    return "\n".join(lines)


def _page(table: str) -> str:
    return f"""# Methods on the example

`python benchmarks/methods_page.py --write docs` made this page. FLOPs (vision tower and prefill) and time (the same
stages) are shares of the unpruned bundle's; time is the median over questions of the ratio. The model is tiny: at 7 to
9 ms a prompt much of the time is the runtime's own, so shares of time fall less than those of FLOPs.

![accuracy against FLOPs and time](results.png)

{table}

Each method is scaled to the budget: sites before layers 1, 4 and 8 (ATP, PyramidDrop and SparseVLM, the latter two in
steps of a half), before layer 1 (FastV, AdaptPrune), in the tower and the decoder in the paper's proportions (IVTP),
at the layer that comes nearest (VTW), in the tower (EViT, ToMe, IVTP-V, TopK), behind it (PruMerge and PruMerge+ with
a fixed share, VisionZip in upstream's proportions, pooling to a square, random). ATP's heads are trained for each
budget, everything else is training-free. DyRate is not in the table: answers of one or two tokens leave it nothing to
do. What is dropped before the decoder costs fewer FLOPs than what is let into its first layers.
"""


def _plot(unpruned: Tally, tallies: dict[tuple[str, float], Tally], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.8), sharey=True)
    flops = statistics.mean(unpruned.flops)
    colours = plt.get_cmap("tab20").colors
    for index, name in enumerate(METHODS):
        marker, colour = "osD^vPX*"[index % 8], colours[index % len(colours)]
        chosen = [tallies[name, share] for share in SHARES]
        accuracy = [100 * statistics.mean(tally.right) for tally in chosen]
        costs = [100 * statistics.mean(tally.flops) / flops for tally in chosen]
        times = [100 * ratio_to(tally, unpruned) for tally in chosen]
        width = 2.4 if name == "ATP" else 1.2
        for axis, values in zip(axes, (costs, times), strict=True):
            axis.plot(
                values, accuracy, marker=marker, color=colour, markersize=5, linewidth=width, label=name
            )
    for axis, label in zip(axes, ("FLOPs, % of unpruned", "time, % of unpruned"), strict=True):
        axis.axhline(100 * statistics.mean(unpruned.right), color="0.6", linewidth=1, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(color="0.92")
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=600, help="held-out questions")
    parser.add_argument("--seed", type=int, default=2024, help="seed of the questions")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where the bundles go")
    parser.add_argument("--write", type=Path, help="folder for results.md and results.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
