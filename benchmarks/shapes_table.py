"""The example's results: unpruned, ATP, IVTP and random tokens at ATP's average count, all as exported bundles.

    python benchmarks/shapes_table.py [--questions 2000] [--write README.md]

Exports the four bundles, asks each the same held-out questions (the bundles take turns question by question, so that
a machine that slows down slows all of them), and prints accuracy, visual tokens, FLOPs and time. With ``--write``
the table replaces the one between the markers in that file.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from machine import describe_machine

import edgeprune
from edgeprune.cost import (
    DecoderShape,
    VisionShape,
    average_visual_tokens,
    decoder_prefill_flops,
    layer_rows,
    vision_flops,
)
from edgeprune.export.exporter import export
from edgeprune.prune.ivtp import Ivtp
from edgeprune.prune.method import PruningMethod
from edgeprune.prune.random_tokens import RandomTokens

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "shapes"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Questions that fix ATP's average count, before the other two are exported with it.
CALIBRATION_QUESTIONS = 200


@dataclass
class Tally:
    """What one bundle did.

    Attributes:
        name: Row of the table.
        session: The opened bundle.
        right: One entry per question.
        tokens: Average visual tokens over the decoder's layers, by question.
        flops: Of the vision tower and the decoder's prefill, by question.
        milliseconds: Of the same two, by question.
        kept: Tokens kept by site, by question.
        objects: Objects in the picture, by question.
    """

    name: str
    session: edgeprune.Session
    right: list[bool] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)

    def ask(self, image: object, question: str, answer: str, num_objects: int) -> None:
        """Ask one question and keep the score."""
        given = self.session.answer([image], question, edgeprune.SamplingOptions(max_new_tokens=24))
        manifest = self.session.bundle.manifest
        geometry, kept = manifest.geometry, [site.kept for site in given.sites]
        visual = geometry.tokens_per_image
        text = given.prompt_tokens - visual
        rows = layer_rows(manifest.sites, geometry.num_layers, visual, kept, text)
        self.right.append(given.text.strip() == answer)
        self.tokens.append(average_visual_tokens(manifest.sites, geometry.num_layers, visual, kept))
        self.flops.append(
            vision_flops(VisionShape.from_geometry(geometry))
            + decoder_prefill_flops(DecoderShape.from_geometry(geometry), rows)
        )
        self.milliseconds.append(
            sum(
                ms
                for stage, ms in given.timings_ms.items()
                if stage in ("vision", "embed", "guide") or stage.startswith(("prefill", "select", "gather"))
            )
        )
        self.kept.append(kept)
        self.objects.append(num_objects)


def main() -> None:
    """Export, ask, print."""
    arguments = _arguments()
    sys.path.insert(0, str(EXAMPLE))
    from heldout import held_out_questions

    output = arguments.output
    checkpoint = EXAMPLE / "checkpoint"
    unpruned = _tally("unpruned", checkpoint, output / "shapes-unpruned", ())
    atp = _tally("ATP", checkpoint, output / "shapes-atp", None)
    for image, question, scene in held_out_questions(CALIBRATION_QUESTIONS, seed=arguments.seed + 1):
        atp.ask(image, question.text, question.answer, len(scene.things))
    average = statistics.mean(atp.tokens)
    atp = Tally(atp.name, atp.session)
    tallies = [
        unpruned,
        atp,
        _tally(
            "IVTP", checkpoint, output / "shapes-ivtp", (_ivtp_at(average, checkpoint),), EXAMPLE / "clip"
        ),
        _tally("random", checkpoint, output / "shapes-random", (RandomTokens(keep=round(average)),)),
    ]
    for image, question, scene in held_out_questions(arguments.questions, seed=arguments.seed):
        for tally in tallies:
            tally.ask(image, question.text, question.answer, len(scene.things))
    text = _table(tallies, arguments.questions)
    print(text)
    print("\n" + _site_table(atp))
    if arguments.write:
        _write(arguments.write, text)


def _tally(
    name: str,
    checkpoint: Path,
    bundle: Path,
    methods: tuple[PruningMethod, ...] | None,
    clip: Path | None = None,
) -> Tally:
    export(checkpoint, bundle, methods=methods, clip=clip)
    return Tally(name, edgeprune.open_session(bundle))


def _ivtp_at(average: float, checkpoint: Path) -> Ivtp:
    """IVTP with the paper's proportions (120 → 64) scaled to an average count over the decoder's layers."""
    from edgeprune.checkpoint import load_checkpoint

    geometry = load_checkpoint(checkpoint, methods=()).model.config.geometry
    best: tuple[float, Ivtp] | None = None
    for after_vision in range(1, geometry.num_patches + 1):
        method = Ivtp(
            tokens_after_vision=after_vision,
            tokens_after_decoder=max(1, round(after_vision * 64 / 120)),
            decoder_layers=min(12, geometry.num_layers),
        )
        sites = method.decoder_sites(geometry)
        counts = [site.keep_per_image for site in sites]
        kept = [count for count in counts if count is not None]
        distance = abs(
            average_visual_tokens([site.cut for site in sites], geometry.num_layers, after_vision, kept)
            - average
        )
        if best is None or distance < best[0]:
            best = (distance, method)
    assert best is not None
    return best[1]


def _table(tallies: list[Tally], questions: int) -> str:
    base = tallies[0]
    lines = [
        f"{questions} held-out questions, greedy answers of the exported bundles; {describe_machine()}.",
        "",
        "| | accuracy | of unpruned | visual tokens per layer | FLOPs (vision + prefill) | time |",
        "|---|---|---|---|---|---|",
    ]
    for tally in tallies:
        accuracy, full = statistics.mean(tally.right), statistics.mean(base.right)
        tokens, patches = statistics.mean(tally.tokens), statistics.mean(base.tokens)
        flops = statistics.mean(tally.flops)
        ratio = statistics.median(a / b for a, b in zip(tally.milliseconds, base.milliseconds, strict=True))
        milliseconds = statistics.median(tally.milliseconds)
        lines.append(
            f"| {tally.name} | {100 * accuracy:.1f} % | {100 * accuracy / full:.1f} % "
            f"| {tokens:.1f} ({100 * tokens / patches:.0f} %) "
            f"| {flops / 1e9:.2f} G ({100 * flops / statistics.mean(base.flops):.0f} %) "
            f"| {milliseconds:.1f} ms ({100 * ratio:.0f} %) |"
        )
    return "\n".join(lines)


def _site_table(tally: Tally) -> str:
    lines = [
        "| ATP site | kept: mean | p5 | p95 | correlation with the number of objects |",
        "|---|---|---|---|---|",
    ]
    kept, objects = np.array(tally.kept), np.array(tally.objects)
    for index, site in enumerate(tally.session.bundle.manifest.sites):
        counts = kept[:, index]
        low, high = np.percentile(counts, [5, 95])
        correlation = np.corrcoef(counts, objects)[0, 1]
        lines.append(f"| {site.place} | {counts.mean():.1f} | {low:.0f} | {high:.0f} | {correlation:.2f} |")
    return "\n".join(lines)


def _write(path: Path, table: str) -> None:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the markers {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=2000, help="held-out questions")
    parser.add_argument("--seed", type=int, default=2024, help="seed of the questions")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where the bundles go")
    parser.add_argument("--write", type=Path, help="file whose table is replaced")
    return parser.parse_args()


if __name__ == "__main__":
    main()
