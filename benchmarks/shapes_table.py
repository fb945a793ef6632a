"""The example's results: unpruned, ATP, IVTP and random tokens at ATP's average count, all as exported bundles.

    python benchmarks/shapes_table.py [--questions 2000] [--write README.md]

Exports the four bundles, asks each the same held-out questions (the bundles take turns question by question, so that
a machine that slows down slows all of them), and prints accuracy, visual tokens, FLOPs and time. With ``--write``
the table replaces the one between the markers in that file.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from machine import describe_machine
from shapes_tally import EXAMPLE, Tally, ivtp_candidates, nearest_to, open_tally, ratio_to

from edgeprune.checkpoint import load_checkpoint
from edgeprune.prune.random_tokens import RandomTokens

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Questions that fix ATP's average count, before the other two are exported with it.
CALIBRATION_QUESTIONS = 200


def main() -> None:
    """Export, ask, print."""
    arguments = _arguments()
    sys.path.insert(0, str(EXAMPLE))
    from heldout import held_out_questions

    output = arguments.output
    checkpoint = EXAMPLE / "checkpoint"
    unpruned = open_tally("unpruned", checkpoint, output / "shapes-unpruned", ())
    atp = open_tally("ATP", checkpoint, output / "shapes-atp", None)
    for image, question, scene in held_out_questions(CALIBRATION_QUESTIONS, seed=arguments.seed + 1):
        atp.ask(image, question.text, question.answer, len(scene.things))
    average = statistics.mean(atp.tokens)
    atp = Tally(atp.name, atp.session)
    geometry = load_checkpoint(checkpoint, methods=()).model.config.geometry
    ivtp = nearest_to(average, ivtp_candidates(geometry), geometry)
    tallies = [
        unpruned,
        atp,
        open_tally("IVTP", checkpoint, output / "shapes-ivtp", (ivtp,), EXAMPLE / "clip"),
        open_tally("random", checkpoint, output / "shapes-random", (RandomTokens(keep=round(average)),)),
    ]
    for image, question, scene in held_out_questions(arguments.questions, seed=arguments.seed):
        for tally in tallies:
            tally.ask(image, question.text, question.answer, len(scene.things))
    text = _table(tallies, arguments.questions)
    print(text)
    print("\n" + _site_table(atp))
    if arguments.write:
        _write(arguments.write, text)


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
        ratio = ratio_to(tally, base)
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
